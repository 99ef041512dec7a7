// Command compute is a compute-bound guest: it sorts, hashes, builds maps and
// multiplies matrices, and prints a checksum.
package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"sort"
	"strconv"
	"strings"
)

func main() {
	rounds := 1
	if len(os.Args) > 1 {
		rounds, _ = strconv.Atoi(os.Args[1])
	}
	sum := uint64(0)
	seed := uint64(1)
	next := func() uint64 {
		seed ^= seed << 13
		seed ^= seed >> 7
		seed ^= seed << 17
		return seed
	}
	for range rounds {
		numbers := make([]int, 20_000)
		for i := range numbers {
			numbers[i] = int(next() % 1_000_003)
		}
		sort.Ints(numbers)
		sum += uint64(numbers[len(numbers)/2])

		words := map[string]int{}
		for i := range 5_000 {
			words["w"+strconv.Itoa(numbers[i]%977)]++
		}
		sum += uint64(len(words))

		const n = 64
		var a, b, c [n][n]float64
		for i := range n {
			for j := range n {
				a[i][j], b[i][j] = float64(next()%100), float64(next()%100)
			}
		}
		for i := range n {
			for j := range n {
				for k := range n {
					c[i][j] += a[i][k] * b[k][j]
				}
			}
		}
		sum += uint64(c[n/2][n/3])

		h := sha256.Sum256([]byte(strings.Repeat("hearth", 20_000)))
		sum += uint64(h[0])
	}
	fmt.Println(sum)
}
