// Function clones per instruction set, chosen when the module is loaded.
#pragma once

// GCC on Linux resolves the clones through ifunc; elsewhere the default code is what there is. Before GCC 12 there are
// no clones for levels such as x86-64-v4.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SSOD_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define SSOD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SSOD_CLONES
#endif
