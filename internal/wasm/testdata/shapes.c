/* Recursion and loops in the shapes that programs have them, for measuring
 * what interrupt checks cost. Each export takes how much work to do and
 * returns a checksum. Freestanding: clang --target=wasm32 -O2 -nostdlib. */
typedef unsigned int u32;
typedef unsigned long long u64;
#define EXPORT(name) __attribute__((export_name(#name), noinline)) u32 name
#define KEEP __attribute__((noinline))

static KEEP u32 fib_(u32 n) { return n < 2 ? n : fib_(n - 1) + fib_(n - 2); }
EXPORT(fib)(u32 n) { return fib_(n); }

/* As a compiler without tail call elimination leaves it. */
static KEEP __attribute__((optnone)) u32 plain_(u32 n) { return n < 2 ? n : plain_(n - 1) + plain_(n - 2); }
EXPORT(fib_unoptimized)(u32 n) { return plain_(n); }

static KEEP u32 ack_(u32 m, u32 n)
{
	if (m == 0)
		return n + 1;
	if (n == 0)
		return ack_(m - 1, 1);
	return ack_(m - 1, ack_(m, n - 1));
}
EXPORT(ackermann)(u32 n)
{
	u32 s = 0;
	while (n--)
		s += ack_(2, 60 + (n & 1));
	return s;
}

static KEEP u32 odd_(u32 n);
static KEEP u32 even_(u32 n) { return n == 0 ? 1 : odd_(n - 1) ^ (n & 1); }
static KEEP u32 odd_(u32 n) { return n == 0 ? 0 : even_(n - 1) ^ (n & 3); }
EXPORT(mutual)(u32 n)
{
	u32 s = 0;
	while (n--)
		s += even_(1000 + (n & 1));
	return s;
}

static struct node { struct node *left, *right; u32 key; } nodes[1 << 14];
static u32 node_count;
static KEEP struct node *grow_(u32 depth)
{
	if (depth == 0 || node_count == sizeof nodes / sizeof nodes[0])
		return 0;
	struct node *n = &nodes[node_count++];
	n->key = depth * 2654435761u;
	n->left = grow_(depth - 1);
	n->right = grow_(depth - 1);
	return n;
}
static KEEP u32 walk_(const struct node *n) { return n ? walk_(n->left) * 31 + n->key + walk_(n->right) : 1; }
EXPORT(tree)(u32 n)
{
	u32 s = 0;
	while (n--) {
		node_count = 0;
		s += walk_(grow_(13));
	}
	return s;
}

static u32 numbers[1 << 12];
static KEEP void sort_(u32 *a, int n)
{
	if (n < 2)
		return;
	u32 pivot = a[n / 2];
	int i = 0, j = n - 1;
	for (;;) {
		while (a[i] < pivot)
			i++;
		while (a[j] > pivot)
			j--;
		if (i >= j)
			break;
		u32 t = a[i];
		a[i++] = a[j];
		a[j--] = t;
	}
	sort_(a, i);
	sort_(a + i, n - i);
}
EXPORT(quicksort)(u32 n)
{
	u32 s = 0, x = 1;
	while (n--) {
		for (u32 i = 0; i < 1 << 12; i++)
			numbers[i] = x = x * 1664525 + 1013904223;
		sort_(numbers, 1 << 12);
		s += numbers[n & 4095];
	}
	return s;
}

static u32 node_add(u32), node_mix(u32), node_leaf(u32);
static u32 (*volatile table_[4])(u32) = { node_leaf, node_add, node_mix, node_add };
static u32 node_leaf(u32 n) { return n; }
static u32 node_add(u32 n) { return n < 4 ? n : table_[(n - 1) & 3](n - 1) + table_[(n - 2) & 3](n - 2); }
static u32 node_mix(u32 n) { return n < 4 ? n : table_[1](n - 1) ^ table_[3](n - 3); }
EXPORT(indirect)(u32 n)
{
	u32 s = 0;
	while (n--)
		s += table_[1](33);
	return s;
}

/* An interpreter's shape: small helpers called from a loop. */
static KEEP u32 op_add(u32 a, u32 b) { return a + b; }
static KEEP u32 op_rot(u32 a, u32 b) { return a << (b & 31) | a >> (-b & 31); }
static KEEP u32 op_sel(u32 a, u32 b) { return a > b ? op_add(a, 7) : op_rot(b, a); }
EXPORT(helpers)(u32 n)
{
	u32 a = 1;
	for (u32 i = 0; i < n * 1000; i++)
		a = op_sel(op_rot(a, i), op_add(a, i));
	return a;
}

/* N queens: recursion with a loop inside. */
static KEEP u32 queens_(u32 all, u32 cols, u32 left, u32 right)
{
	if (cols == all)
		return 1;
	u32 count = 0;
	for (u32 free = all & ~(cols | left | right); free;) {
		u32 bit = free & -free;
		free ^= bit;
		count += queens_(all, cols | bit, (left | bit) << 1, (right | bit) >> 1);
	}
	return count;
}
EXPORT(queens)(u32 n)
{
	u32 s = 0;
	while (n--)
		s += queens_((1u << 8) - 1 + (n & 1) * 256, 0, 0, 0);
	return s;
}

static unsigned char composite[1 << 16];
EXPORT(sieve)(u32 n)
{
	u32 primes = 0;
	while (n--) {
		for (u32 i = 0; i < sizeof composite; i++)
			composite[i] = 0;
		for (u32 i = 2; i < sizeof composite; i++) {
			if (composite[i])
				continue;
			primes++;
			for (u32 j = i * 2; j < sizeof composite; j += i)
				composite[j] = 1;
		}
	}
	return primes;
}

enum { dim = 64 };
static double ma[dim][dim], mb[dim][dim], mc[dim][dim];
EXPORT(matmul)(u32 n)
{
	double trace = 0;
	for (int i = 0; i < dim; i++)
		for (int j = 0; j < dim; j++) {
			ma[i][j] = i + j;
			mb[i][j] = i - j;
		}
	while (n--) {
		for (int i = 0; i < dim; i++)
			for (int j = 0; j < dim; j++) {
				double sum = 0;
				for (int k = 0; k < dim; k++)
					sum += ma[i][k] * mb[k][j];
				mc[i][j] = sum;
			}
		trace += mc[n % dim][n % dim];
	}
	return (u32)(long long)trace;
}

static const u32 K[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
static KEEP void sha_(u32 *h, const u32 *block)
{
	u32 w[64], v[8];
	for (int i = 0; i < 16; i++)
		w[i] = block[i];
#define ROT(x, k) ((x) >> (k) | (x) << (32 - (k)))
	for (int i = 16; i < 64; i++)
		w[i] = w[i - 16] + w[i - 7] + (ROT(w[i - 15], 7) ^ ROT(w[i - 15], 18) ^ w[i - 15] >> 3) +
		       (ROT(w[i - 2], 17) ^ ROT(w[i - 2], 19) ^ w[i - 2] >> 10);
	for (int i = 0; i < 8; i++)
		v[i] = h[i];
	for (int i = 0; i < 64; i++) {
		u32 t = v[7] + (ROT(v[4], 6) ^ ROT(v[4], 11) ^ ROT(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
		u32 u = (ROT(v[0], 2) ^ ROT(v[0], 13) ^ ROT(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
		for (int k = 7; k > 0; k--)
			v[k] = v[k - 1];
		v[4] += t;
		v[0] = t + u;
	}
	for (int i = 0; i < 8; i++)
		h[i] += v[i];
}
EXPORT(sha256)(u32 n)
{
	u32 h[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
	u32 block[16] = { 0 };
	for (u32 i = 0; i < n; i++) {
		block[0] = i;
		sha_(h, block);
	}
	return h[0];
}
EXPORT(hash)(u32 n)
{
	u64 h = 14695981039346656037u;
	for (u32 i = 0; i < n * 1000; i++)
		h = (h ^ (i & 0xff)) * 1099511628211u;
	return (u32)h;
}
