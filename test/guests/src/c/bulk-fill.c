/* Hostile: spends its time inside memory.fill, one instruction that moves
 * tens of megabytes. Built with -mbulk-memory. */
int main(void)
{
	enum { page = 65536, pages = 1024 };
	unsigned long at = __builtin_wasm_memory_grow(0, pages);
	if (at == (unsigned long)-1)
		return 1;
	for (volatile unsigned i = 0;; i++)
		__builtin_memset((void *)(at * page), (int)i, (unsigned long)pages * page);
}
