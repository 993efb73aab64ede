"""`python -m eval`: evaluate samples. The stage is imported once its config is valid."""

from configs import ctrl_c  # noqa: F401 (first: it meets Ctrl-C during the imports below)
from configs.entry import entry
from eval.config import EvalConfig

main = entry("eval", EvalConfig, "eval.stage:run")

if __name__ == "__main__":
    main()
