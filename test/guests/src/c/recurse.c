/* Hostile: recurses without end and without a stack of its own in linear
 * memory, so that only the engine's call stack can stop it. */
static volatile unsigned going = 1;

__attribute__((noinline)) static unsigned down(unsigned n)
{
	if (!going)
		return n;
	return down(n + 1) + going;
}

int main(void) { return (int)down(0); }
