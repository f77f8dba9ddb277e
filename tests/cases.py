"""The one table of what batch normalization is tested on: shapes, layouts, dtypes, activations, tolerances. Data only.

Shapes: N examples, C channels, S places; m = N * S values per channel.
"""

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)

# One of each rank; odd sizes, so that a kernel's last vector is a part of one; m from 6 up to thousands. (With m = 2,
# xhat is 1 or -1 whatever x is, and the gradient all but nothing: no error is small beside it.)
SHAPES = ((6, 3), (33, 17), (5, 3, 7), (4, 5, 6, 3), (2, 16, 33, 35), (3, 2, 3, 2, 5))

# How the values of an (N, C, ...) tensor lie in memory; tests make them out of a contiguous one.
LAYOUTS = ("contiguous", "channels_last", "transposed", "every_second", "expanded")

SLOPE = 0.2
ACTIVATIONS = (
    None, "relu", "relu6", ("leaky_relu", SLOPE), "silu", "hardswish", "sigmoid", "tanh", "gelu", "gelu_tanh",
    ("elu", 0.7), "mish", ("hardtanh", -1.3, 0.7),
)  # fmt: skip

# Largest error against float64, in units of the dtype's eps and of the largest value of the channel.
# The reference rounds once, after sums in a wider dtype: half a unit, and a little for what the wider dtype rounded.
# float64 has no wider dtype, here or for what it is compared with: some units for sums of thousands.
REFERENCE_ULP = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 1, torch.float64: 32}
# Its (C,) results beside 16-bit inputs are float32 and come from float32 sums of thousands.
REFERENCE_SUM_ULP = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 1, torch.float64: 32}
# torch rounds up to three times (normalizing, adding, activating), and computes float32 in float32 but for the sums.
# In float64 it adds the m values up one after the other: up to m units, typically sqrt(m).
ATEN_ULP = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 32, torch.float64: 256}

# What no kernel may exceed in the cases below, where torch itself does not.
ADVERSARIAL_ULP = 2

# Inputs that break careless sums: (name, dtype, mean, standard deviation, m).
ADVERSARIAL = (
    ("mean 1e6 times the deviation", torch.float32, 1e6, 1.0, 4096),  # E[x^2] - E[x]^2 keeps no digit
    ("mean 1e3 times the deviation", torch.float32, -1e3, 1.0, 4096),
    ("constant", torch.float32, 3.3, 0.0, 1024),
    ("constant", torch.bfloat16, 3.3, 0.0, 1024),
    ("variance far below eps", torch.float32, 0.0, 1e-8, 1024),
    ("variance below eps, far from 0", torch.float32, 1.0, 1e-4, 1024),
    ("squares beyond float32", torch.float32, 0.0, 1e25, 1024),
    ("denormal", torch.float32, 0.0, 1e-40, 1024),
    ("sum beyond float16", torch.float16, 6e4, 500.0, 4096),
    ("squares beyond float16", torch.float16, 0.0, 1e4, 4096),
    ("mean 100 times the deviation", torch.bfloat16, 100.0, 1.0, 4096),
)
