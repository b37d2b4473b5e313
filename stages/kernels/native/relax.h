/* What a loop that waits does between two looks. */
#ifndef RELAX_H
#define RELAX_H

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() (void)0
#endif

#endif
