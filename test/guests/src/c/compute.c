/* Compute-bound: a sieve, a matrix product, recursive calls and a hash,
 * QUERY_STRING rounds of them (or argv[1] when run by hand); "9-fib" does 9
 * rounds of one alone. Prints a checksum so that nothing is optimised away. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { sieve_size = 1 << 20, dim = 160 };

static unsigned char composite[sieve_size];
static double a[dim][dim], b[dim][dim], c[dim][dim];

static uint32_t sieve(void)
{
	uint32_t primes = 0;
	memset(composite, 0, sizeof composite);
	for (uint32_t i = 2; i < sieve_size; i++) {
		if (composite[i])
			continue;
		primes++;
		for (uint32_t j = i * 2; j < sieve_size; j += i)
			composite[j] = 1;
	}
	return primes;
}

static double product(void)
{
	double trace = 0;
	for (int i = 0; i < dim; i++)
		for (int j = 0; j < dim; j++) {
			a[i][j] = i + j;
			b[i][j] = i - j;
		}
	for (int i = 0; i < dim; i++)
		for (int j = 0; j < dim; j++) {
			double sum = 0;
			for (int k = 0; k < dim; k++)
				sum += a[i][k] * b[k][j];
			c[i][j] = sum;
		}
	for (int i = 0; i < dim; i++)
		trace += c[i][i];
	return trace;
}

static uint32_t fib(uint32_t n)
{
	return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint64_t hash(uint64_t h)
{
	for (uint32_t i = 0; i < 4u << 20; i++)
		h = (h ^ (i & 0xff)) * 1099511628211u;
	return h;
}

int main(int argc, char **argv)
{
	const char *q = getenv("QUERY_STRING");
	if (!q || !*q)
		q = argc > 1 ? argv[1] : "1";
	int rounds = atoi(q);
	const char *only = strchr(q, '-');
	uint64_t sum = 14695981039346656037u;

	if (rounds < 1)
		rounds = 1;
	if (only)
		only++;
	for (int i = 0; i < rounds; i++) {
		if (!only || !strcmp(only, "sieve"))
			sum += sieve();
		if (!only || !strcmp(only, "product"))
			sum += (uint64_t)(int64_t)product();
		if (!only || !strcmp(only, "fib"))
			sum += fib(28);
		if (!only || !strcmp(only, "hash"))
			sum = hash(sum);
	}
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\n", stdout);
	printf("%016llx\n", (unsigned long long)sum);
	return 0;
}
