"""An infinite or NaN logit at an ignored pixel: nothing in our own losses, stock's NaN in cross_entropy."""

import math

from tests.ignored_pixels import LAYOUTS, check_as_stock, check_inert

test_inert = check_inert("triton", [math.nan], LAYOUTS[:1])
test_as_stock = check_as_stock("triton", [math.inf])
