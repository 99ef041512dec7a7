/* Hostile: a recursion that returns and starts again, for ever. */
static volatile unsigned going = 1;

__attribute__((noinline)) static unsigned down(unsigned n)
{
	return n == 0 ? going : down(n - 1) + going;
}

int main(void)
{
	while (going)
		down(1000);
	return 0;
}
