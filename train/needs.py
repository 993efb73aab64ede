"""`python -m deradiff needs`: what a training needs on 1 to 64 GPUs, counted and not run.

It takes the keys of `python -m train`, and those of the section `needs`.
"""

from configs import ctrl_c  # noqa: F401 (first: it meets Ctrl-C during the imports below)
from configs.entry import entry
from train.needs_config import NeedsConfig

main = entry("needs", NeedsConfig, "train.scale:run")

if __name__ == "__main__":
    main()
