"""`python -m train`: align a model. The stage is imported once its config is valid."""

from configs import ctrl_c  # noqa: F401 (first: it meets Ctrl-C during the imports below)
from configs.entry import entry
from train.config import TrainConfig

main = entry("train", TrainConfig, "train.stage:run")

if __name__ == "__main__":
    main()
