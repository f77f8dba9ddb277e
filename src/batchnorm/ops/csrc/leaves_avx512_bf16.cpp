// The leaf loops for avx512 with bfloat16: compiled with that instruction set's flags (setup.py).
#include "leaves.h"

Leaf avx512_bf16::choose(Choice choice) { return choose_leaf(choice); }
