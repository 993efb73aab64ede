"""The benchmark of sampling at its smallest.

Every row is there, and the published loop samples what `realign` does.
"""

import torch

from benchmarks import published_loop, rehearsal, sample
from deradiff import realign


def test_all_tables_come_out(capsys):
    sample.main(["--steps", "4", "--batch", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    cost = {}
    for row in rows:
        if len(row) == 6 and row[2] != "evaluations":
            cost[row[0].strip("| "), row[1]] = float(row[2])
    assert cost == {
        ("plain", ""): 1,
        ("lora", "exact"): 2,
        ("lora", "exact, merged"): 2,
        ("lora", "exact, batched"): 2,
        ("lora", "weights"): 1,
        ("lora", "reuse, every=4"): 1.25,
        ("lora", "sampled"): 1,
        ("full", "exact"): 2,
        ("full", "weights"): 1,
        ("full", "reuse, every=4"): 1.25,
        ("full", "sampled"): 1,
    }
    headers = {4: "sweep of 5 lambdas", 5: "exact, lambda 0.5"}
    for columns, header in headers.items():
        names = [row[0].strip("| ") for row in rows if len(row) == columns]
        assert names == [header, "lora", "full"]

    # Guidance and steps take the least part of a call.
    of_path_kl = [row for row in rows if len(row) == 5 and row[0] != "| exact, lambda 0.5"]
    for _, whole, known, unknown, _ in of_path_kl:
        assert 0 < float(unknown.split()[0]) < float(whole.split()[0])
        assert 0 < float(known.split()[0]) < float(whole.split()[0])


def test_the_interval_of_a_median_is_that_of_the_signs():
    # Of ten values it goes from the second to the ninth: P(fewer than two below) = 11 / 1024.
    assert sample.with_interval([float(value) for value in range(10)]) == "4.5 [1, 8]"
    assert sample.with_interval([2.0, 1.0, 4.0]) == "2 [1, 4]"
    assert sample.with_interval([1.0]) == "1 [1, 1]"


def test_random_networks_of_the_published_shapes_sample():
    for network in ("sd15", "sdxl"):
        args = sample.parse_arguments(
            ["--network", network, "--width", "32", "--pixels", "64", "--batch", "1"]
        )
        pipe = sample.make_pipeline(args)
        prompts = sample.embeddings(pipe, 1)
        latents = pipe(**prompts, num_inference_steps=1, output_type="latent").images
        assert latents.isfinite().all()


def test_the_published_loop_samples_the_same_images(tmp_path):
    stopwatch = sample.Stopwatch(sample.parse_arguments(["--steps", "3", "--batch", "2"]), tmp_path)
    anchor = stopwatch.anchors["full"].network(
        stopwatch.pipe.unet, torch.device("cpu"), torch.float32
    )
    with realign(stopwatch.pipe, stopwatch.anchors["full"], 0.3):
        ours = stopwatch.call()
    for image in range(2):
        prompt = {name: tensor[image : image + 1] for name, tensor in stopwatch.prompts.items()}
        theirs = published_loop.sample(
            stopwatch.pipe, anchor, 0.3, 3, 5.0, tuple(ours.shape[1:]), image, prompt
        )
        torch.testing.assert_close(theirs[0], ours[image], rtol=1e-3, atol=1e-3)


def test_a_rehearsed_command_has_its_seconds_silence_and_memory(tmp_path):
    done = rehearsal.rehearse("zen", ["this"])
    assert done.status == 0
    assert "Beautiful is better than ugly" in done.output
    assert 0 < done.silence <= done.seconds
    assert done.memory > 1e6
    assert rehearsal.table([done]).splitlines()[-1].startswith("| zen | ")
    commands = rehearsal.commands(tmp_path, rehearsal.NETWORKS["tiny"])
    assert {"train: LoRA", "sample: exact", "sample: bake"} <= set(commands)
