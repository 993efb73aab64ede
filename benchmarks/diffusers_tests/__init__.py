"""The dial on every pipeline of diffusers' own tests: `python -m benchmarks.diffusers_tests`."""
