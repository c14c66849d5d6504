// The step for processors with AVX512_BF16, which multiply bf16 twice as fast as fp32: the same file, built for them.

#include "step.cpp"
