"""An infinite or NaN logit at an ignored pixel: no effect in our own losses, stock's NaN in cross_entropy."""

from tests.ignored_pixels import check_as_stock, check_inert

test_inert_on_cpu = check_inert("cpu")
test_inert_on_reference = check_inert("reference")
test_cpu_as_stock = check_as_stock("cpu")
test_reference_as_stock = check_as_stock("reference")
