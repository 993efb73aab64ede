"""The dial on flow models (SD3, FLUX): what velocities, packed latents and repeated evaluations
change."""

import pytest
import torch

from deradiff.realignment.context import realign
from deradiff.realignment.resampling import GuidedParticlesWarning
from tests.support.realign_world import sample


@pytest.fixture(params=["sd3", "flux"])
def flow(request, worlds):
    return worlds[request.param].copy()


@pytest.mark.parametrize("method", ["full1", "lora1"])
def test_a_mixed_batch_is_each_lambda_on_its_own(flow, method):
    lams = (0.0, 0.4, 1.0)
    with realign(flow.pipe, flow.anchors[method], lam=torch.tensor(lams)) as dial:
        together = sample(flow.pipe, (0, 1, 2))
        for image, lam in enumerate(lams):
            dial.lam = lam
            alone = sample(flow.pipe, (0, 1, 2))[image]
            atol = 0 if lam in (0, 1) else 1e-5
            torch.testing.assert_close(alone, together[image], atol=atol, rtol=0)


def test_path_kl_is_that_of_velocities(flow):
    """Sum of lam^2 c |Dv|^2, c = ln(t / t_n) - (t - t_n); at the last step (1 - t)^2 / 2."""
    lam = 0.5
    outputs = []
    anchor = flow.stock("full1").transformer
    with realign(flow.pipe, flow.anchors["full1"], lam) as dial:
        forward = flow.denoiser.forward

        def watched(*args, **kwargs):
            mixed = forward(*args, **kwargs)
            outputs.append((mixed[0], anchor(*args, **kwargs)[0]))
            return mixed

        flow.denoiser.forward = watched
        sample(flow.pipe, guidance_scale=1.0)
        flow.denoiser.forward = forward
        path_kl = dial.path_kl

    t = flow.pipe.scheduler.sigmas.double()
    total = torch.zeros(2, dtype=torch.float64)
    for i, (mixed, theirs) in enumerate(outputs):
        # The mixture lies in the middle between the reference and the anchor.
        difference = 2 * (theirs - mixed)
        squared = difference.double().square().flatten(1).sum(1)
        c = (1 - t[i]) ** 2 / 2
        if t[i + 1] > 0:
            c = (t[i] / t[i + 1]).log() - (t[i] - t[i + 1])
        total += lam**2 * c * squared
    assert (path_kl > 0).all()
    torch.testing.assert_close(path_kl.double(), total, rtol=1e-3, atol=0)


def test_rows_of_a_lora_as_one_batch(flow):
    with realign(flow.pipe, flow.anchors["lora1"], 0.6):
        apart = sample(flow.pipe)
    with realign(flow.pipe, flow.anchors["lora1"], 0.6, batched=True) as dial:
        torch.testing.assert_close(sample(flow.pipe), apart, atol=2e-5, rtol=0)
        assert dial.evaluations == 2


def test_reuse_and_the_first_step(flow):
    with realign(flow.pipe, flow.anchors["full1"], 0.3, shared_start=True) as dial:
        exact = sample(flow.pipe, num_inference_steps=8)
        dial.lam = 0.6
        sample(flow.pipe, num_inference_steps=8)
        assert dial.evaluations == 2
        dial.lam = 0
        reference = sample(flow.pipe, num_inference_steps=8)
    with realign(flow.pipe, flow.anchors["full1"], 0.3, mode="reuse", every=2) as dial:
        reused = sample(flow.pipe, num_inference_steps=8)
        assert dial.evaluations == pytest.approx(1.5)
    assert 0 < (reused - exact).norm() < 0.3 * (exact - reference).norm()


@pytest.mark.filterwarnings("ignore::deradiff.realignment.resampling.GuidedParticlesWarning")
def test_particles(flow):
    with realign(flow.pipe, flow.anchors["full1"], 0.5, particles=4) as dial:
        together = sample(flow.pipe, (0, 1), num_images_per_prompt=4)
        assert len(together) == 8
        assert dial.ess.shape == (2,)
        assert (dial.ess <= 4).all()
        assert torch.equal(sample(flow.pipe, (0, 1), num_images_per_prompt=4), together)


def test_a_mask_over_the_latents(flow):
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1

    def latents():
        images = sample(flow.pipe, num_inference_steps=1)
        if flow.family == "flux":
            return flow.pipe._unpack_latents(images, 64, 64, 8)
        return images

    with realign(flow.pipe, flow.anchors["full1"], mask) as dial:
        split = latents()
        dial.lam = 0
        reference = latents()
        dial.lam = 1
        anchor = latents()
    assert torch.equal(split[..., :4], reference[..., :4])
    assert torch.equal(split[..., 4:], anchor[..., 4:])


def test_flux_with_true_guidance_realigns_both_of_its_evaluations(worlds):
    flux = worlds["flux"].copy()
    options = {"true_cfg_scale": 2.0, "negative_prompt": ["blurry"] * 2}
    reference = sample(flux.pipe, **options)
    anchor = sample(flux.stock("full1"), **options)
    with realign(flux.pipe, flux.anchors["full1"], 0) as dial:
        assert torch.equal(sample(flux.pipe, **options), reference)
        dial.lam = 1
        assert torch.equal(sample(flux.pipe, **options), anchor)
        dial.lam = 0.5
        sample(flux.pipe, **options)
        assert dial.path_kl.gt(0).all()
        assert dial.evaluations == 2
    with (
        realign(flux.pipe, flux.anchors["full1"], 0.5, particles=2),
        pytest.warns(GuidedParticlesWarning, match="heuristic"),
    ):
        sample(flux.pipe, num_images_per_prompt=2, negative_prompt=["blurry"] * 2, true_cfg_scale=2)
