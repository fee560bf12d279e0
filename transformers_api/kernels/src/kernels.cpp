// CPU kernels: linear layers, attention, the operations between them, sampling, inspection.
//
// Built by ../build.py, called through ctypes (../abi.py). No torch, no Python: pointers in, results
// out, no exceptions. Start reading at abi.h.
//
// One translation unit (a unity build), because the compiler then sees every caller of a kernel, and
// everything but the functions of abi.h has internal linkage.
//
// The promise of all these files: a row's result is the same to the last bit alone and in company.
// Each output is computed by one thread, in an order of summation that depends on the row itself and
// on its layer, never on the number of rows, their places, the number of threads or their timing.

#include "abi.cpp"
#include "attention.cpp"
#include "gemm.cpp"
#include "experts.cpp"
#include "graph.cpp"
#include "inspect.cpp"
#include "low_rank.cpp"
#include "multiply_blocks.cpp"
#include "pack.cpp"
#include "pack_blocks.cpp"
#include "sample.cpp"
#include "thread_pool.cpp"
