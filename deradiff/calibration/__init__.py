"""What an anchor is: how strongly it is aligned, told by preferences that it was not trained on."""
