"""`python -m deradiff calibrate`: what an anchor is, from pairs that it was not trained on."""

from configs import ctrl_c  # noqa: F401 (first: it meets Ctrl-C during the imports below)
from configs.entry import entry
from sample.calibrate_config import CalibrateConfig

main = entry("calibrate", CalibrateConfig, "sample.calibration:run")

if __name__ == "__main__":
    main()
