package main

import (
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// storeLatency is how long the store takes before it answers, about as S3
	// does within a region.
	storeLatency = 10 * time.Millisecond
	// maxObject bounds what is written to the store.
	maxObject = 1 << 20
	// slice is what passes between two looks at the clock.
	slice = 256 << 10
)

// store speaks as much S3 as bootstrap does: objects that are written under
// conditions, and files that are read with ranges. It is here because moto
// serves files at the speed of Python, on the processors that are measured.
type store struct {
	// rate is what one connection carries, in bytes per second; 0 is no limit.
	rate int64

	mu      sync.Mutex
	objects map[string][]byte // by /bucket/key
	files   map[string]string // /bucket/key to a path of this machine
}

func newStore(rate int64) *store {
	return &store{rate: rate, objects: map[string][]byte{}, files: map[string]string{}}
}

// put is for what the bench itself puts there.
func (s *store) put(name string, content []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[name] = content
}

func (s *store) serve(name, path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[name] = path
}

// tag is the entity tag that S3 gives, an MD5 in hex: not a secret.
func tag(content []byte) string {
	sum := md5.Sum(content)
	return `"` + hex.EncodeToString(sum[:]) + `"`
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, code)
}

// ServeHTTP answers https://docs.aws.amazon.com/AmazonS3/latest/API/
// GetObject, PutObject, DeleteObject and ListObjectsV2, path style.
func (s *store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	time.Sleep(storeLatency)
	name := r.URL.Path
	if bucket := strings.Trim(name, "/"); r.Method == http.MethodGet && !strings.Contains(bucket, "/") {
		s.list(w, bucket, r.URL.Query().Get("prefix"))
		return
	}
	s.mu.Lock()
	content, found := s.objects[name]
	path, isFile := s.files[name]
	s.mu.Unlock()
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		switch {
		case isFile:
			s.send(w, r, path)
		case found:
			w.Header().Set("ETag", tag(content))
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			_, _ = w.Write(content) // who went away is not told
		default:
			refuse(w, http.StatusNotFound, "NoSuchKey")
		}
	case http.MethodPut:
		body, err := io.ReadAll(io.LimitReader(r.Body, maxObject))
		if err != nil || r.Header.Get("Content-Encoding") == "aws-chunked" {
			refuse(w, http.StatusBadRequest, "InvalidRequest")
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		content, found := s.objects[name]
		if r.Header.Get("If-None-Match") == "*" && found || r.Header.Get("If-Match") != "" && (!found || r.Header.Get("If-Match") != tag(content)) {
			refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
			return
		}
		s.objects[name] = body
		w.Header().Set("ETag", tag(body))
	case http.MethodDelete:
		s.mu.Lock()
		delete(s.objects, name)
		s.mu.Unlock()
		w.WriteHeader(http.StatusNoContent)
	default:
		refuse(w, http.StatusMethodNotAllowed, "MethodNotAllowed")
	}
}

func (s *store) list(w http.ResponseWriter, bucket, prefix string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		key, ok := strings.CutPrefix(name, "/"+bucket+"/")
		if ok && strings.HasPrefix(key, prefix) && !strings.Contains(strings.TrimPrefix(key, prefix), "/") {
			fmt.Fprintf(&out, "<Contents><Key>%s</Key><Size>%d</Size></Contents>", key, len(s.objects[name]))
		}
	}
	w.Header().Set("Content-Type", "application/xml")
	fmt.Fprintf(w, "<ListBucketResult><Name>%s</Name><Prefix>%s</Prefix><IsTruncated>false</IsTruncated>%s</ListBucketResult>", bucket, prefix, out.String())
}

func (s *store) send(w http.ResponseWriter, r *http.Request, path string) {
	file, err := os.Open(path)
	if err != nil {
		refuse(w, http.StatusNotFound, "NoSuchKey")
		return
	}
	defer file.Close()
	if s.rate > 0 {
		w = &paced{ResponseWriter: w, rate: s.rate, began: time.Now()}
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, path, time.Time{}, file)
}

// paced lets bytes through at a rate. It hides that the connection can send
// files by itself.
type paced struct {
	http.ResponseWriter
	rate  int64
	began time.Time
	sent  int64
	since int64 // bytes since the last look at the clock
}

func (p *paced) Write(b []byte) (int, error) {
	n, err := p.ResponseWriter.Write(b)
	p.sent += int64(n)
	if p.since += int64(n); p.since >= slice {
		p.since = 0
		time.Sleep(time.Until(p.began.Add(time.Duration(float64(p.sent) / float64(p.rate) * float64(time.Second)))))
	}
	return n, err
}
