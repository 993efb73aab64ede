"""What can be trained. `registry` lists the objectives, `base` says what each of them offers."""
