// The leaf loops for avx2: compiled with that instruction set's flags (setup.py).
#include "leaves.h"

Leaf avx2::choose(Choice choice) { return choose_leaf(choice); }
