/* Hostile: no loop at all, only a doubling call chain that would take 2^40
 * calls. A check at loop headers alone never runs. */
#define NEXT(n, m) \
	__attribute__((noinline)) static unsigned f##n(volatile unsigned *x) \
	{ *x += n; return f##m(x) + f##m(x); }

__attribute__((noinline)) static unsigned f0(volatile unsigned *x) { return (*x)++; }
NEXT(1, 0) NEXT(2, 1) NEXT(3, 2) NEXT(4, 3) NEXT(5, 4) NEXT(6, 5) NEXT(7, 6)
NEXT(8, 7) NEXT(9, 8) NEXT(10, 9) NEXT(11, 10) NEXT(12, 11) NEXT(13, 12)
NEXT(14, 13) NEXT(15, 14) NEXT(16, 15) NEXT(17, 16) NEXT(18, 17) NEXT(19, 18)
NEXT(20, 19) NEXT(21, 20) NEXT(22, 21) NEXT(23, 22) NEXT(24, 23) NEXT(25, 24)
NEXT(26, 25) NEXT(27, 26) NEXT(28, 27) NEXT(29, 28) NEXT(30, 29) NEXT(31, 30)
NEXT(32, 31) NEXT(33, 32) NEXT(34, 33) NEXT(35, 34) NEXT(36, 35) NEXT(37, 36)
NEXT(38, 37) NEXT(39, 38) NEXT(40, 39)

int main(void)
{
	volatile unsigned x = 0;
	return (int)f40(&x);
}
