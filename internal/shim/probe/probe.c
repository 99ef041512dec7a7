/*
 * The probe that a Wasm runtime must run to prove itself: a wasip1 command
 * that prints the SHA-256 of a fixed prefix and its last argument, in hex.
 *
 * The argument is made at run time, so the answer can neither be prepared nor
 * be an echo: somebody executed this module. The blank header makes the same
 * output a valid CGI response, for runtimes that only answer HTTP (Spin's
 * "wagi" executor passes the query string as the last argument).
 *
 * Freestanding, so that it stays below 2 KB and needs nothing but the four
 * oldest functions of wasi_snapshot_preview1. Exit status: 0, or 1 when it
 * cannot read its arguments or write.
 *
 * See ../probe.go for how probe.wasm is made from this file.
 */
typedef unsigned char u8;
typedef unsigned int u32;

#define WASI(name) __attribute__((import_module("wasi_snapshot_preview1"), import_name(#name)))
WASI(args_sizes_get) int args_sizes_get(u32 *count, u32 *size);
WASI(args_get) int args_get(u8 **argv, u8 *buffer);
WASI(fd_write) int fd_write(int fd, const void *vectors, u32 count, u32 *written);
WASI(proc_exit) _Noreturn void proc_exit(int status);

#define MAX_ARGUMENTS 16
#define MAX_BYTES 4096

static const char prefix[] = "hearth.sh/probe/v1\n";
static const char header[] = "content-type: text/plain\n\n";

static const u32 k[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
static u32 state[8] = {
	0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};
static u8 block[64];
static u32 length;

static u32 rotate(u32 x, int n) { return x >> n | x << (32 - n); }

/* One round of FIPS 180-4, section 6.2.2. */
static void compress(void) {
	u32 w[64], v[8];
	for (int i = 0; i < 16; i++)
		w[i] = (u32)block[4 * i] << 24 | (u32)block[4 * i + 1] << 16 | (u32)block[4 * i + 2] << 8 | block[4 * i + 3];
	for (int i = 16; i < 64; i++)
		w[i] = w[i - 16] + w[i - 7]
			+ (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3)
			+ (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10);
	for (int i = 0; i < 8; i++)
		v[i] = state[i];
	for (int i = 0; i < 64; i++) {
		u32 t1 = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25))
			+ ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
		u32 t2 = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22))
			+ ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
		for (int j = 7; j > 0; j--)
			v[j] = v[j - 1];
		v[4] += t1;
		v[0] = t1 + t2;
	}
	for (int i = 0; i < 8; i++)
		state[i] += v[i];
}

static void add(u8 byte) {
	block[length++ % 64] = byte;
	if (length % 64 == 0)
		compress();
}

static u8 *arguments[MAX_ARGUMENTS];
static u8 bytes[MAX_BYTES];
static u8 output[sizeof header - 1 + 64 + 1];

void _start(void) {
	u32 count, size, written;
	if (args_sizes_get(&count, &size) || count == 0 || count > MAX_ARGUMENTS || size > MAX_BYTES || args_get(arguments, bytes))
		proc_exit(1);
	for (const char *c = prefix; *c; c++)
		add(*c);
	for (const u8 *c = arguments[count - 1]; *c; c++)
		add(*c);
	u32 bits = length * 8;
	add(0x80);
	while (length % 64 != 56)
		add(0);
	for (int i = 0; i < 4; i++) /* the upper half of the 64-bit length */
		add(0);
	for (int shift = 24; shift >= 0; shift -= 8)
		add(bits >> shift);

	u8 *out = output;
	for (const char *c = header; *c; c++)
		*out++ = *c;
	for (int i = 0; i < 64; i++)
		*out++ = "0123456789abcdef"[state[i / 8] >> (28 - 4 * (i % 8)) & 15];
	*out++ = '\n';
	struct { const u8 *data; u32 size; } vector = { output, sizeof output };
	if (fd_write(1, &vector, 1, &written) || written != sizeof output)
		proc_exit(1);
}
