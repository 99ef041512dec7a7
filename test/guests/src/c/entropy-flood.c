/* Hostile: asks for random bytes without end. */
#include <stdlib.h>
#include <unistd.h>

int main(void)
{
	static unsigned char buf[1 << 20];
	for (;;)
		for (unsigned i = 0; i + 256 <= sizeof buf; i += 256)
			getentropy(buf + i, 256);
}
