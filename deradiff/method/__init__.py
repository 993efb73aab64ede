"""The mathematics of the paper, without pipelines and files.

A way to read it: `gaussian` (how two Gaussians are mixed), `transitions` (which Gaussian a step of
each sampler draws from; `steps` has the noise levels), `chain` (Algorithm 1, from noise to data).
`lambdas` says what lambda may be, and `particles` corrects what mixing step by step gets wrong.
`samplers` and `schedulers` make the diffusers scheduler of a name.
"""
