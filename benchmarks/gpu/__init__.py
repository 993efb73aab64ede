"""Every check that needs a GPU, with random weights at the published sizes: `make gpu`."""
