/* Hostile: sleeps for ever. */
#include <time.h>

int main(void)
{
	struct timespec day = {86400, 0};
	for (;;)
		nanosleep(&day, 0);
}
