/* Random bytes and both clocks, one per line. */
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(void)
{
	unsigned char bytes[32];
	struct timespec wall, mono;

	if (getentropy(bytes, sizeof bytes) != 0)
		return 1;
	clock_gettime(CLOCK_REALTIME, &wall);
	clock_gettime(CLOCK_MONOTONIC, &mono);
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\n", stdout);
	for (unsigned i = 0; i < sizeof bytes; i++)
		printf("%02x", bytes[i]);
	printf("\n%lld\n%lld\n",
	       (long long)wall.tv_sec * 1000000000 + wall.tv_nsec,
	       (long long)mono.tv_sec * 1000000000 + mono.tv_nsec);
	return 0;
}
