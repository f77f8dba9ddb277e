// The leaf loops for generic: compiled with that instruction set's flags (setup.py).
#include "leaves.h"

Leaf generic::choose(Choice choice) { return choose_leaf(choice); }
