"""`python -m sample`: sample an anchor. The stage is imported once its config is valid."""

from configs import ctrl_c  # noqa: F401 (first: it meets Ctrl-C during the imports below)
from configs.entry import entry
from sample.config import SampleConfig

main = entry("sample", SampleConfig, "sample.stage:run")

if __name__ == "__main__":
    main()
