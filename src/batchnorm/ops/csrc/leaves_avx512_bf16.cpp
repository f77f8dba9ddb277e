// The leaf loops of bfloat16 where avx512 has instructions for it: compiled with their flags (setup.py).
#include "leaves.h"

Leaf avx512_bf16::choose(Choice choice) {
  return choice.type == Type::bfloat16 ? ::choose<BFloat16>(choice) : avx512::choose(choice);
}
