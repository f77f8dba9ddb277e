// The leaf loops for avx512: compiled with that instruction set's flags (setup.py).
#include "leaves.h"

Leaf avx512::choose(Choice choice) { return choose_leaf(choice); }
