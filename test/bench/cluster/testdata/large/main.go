// Command large is a wasip1 module of some 12 MB, all of it real code: what a
// shim has to compile before such a program's first pod starts. It says that it
// runs, and waits to be ended.
package main

import (
	"archive/tar"
	"database/sql"
	"debug/dwarf"
	"debug/elf"
	"encoding/gob"
	"encoding/xml"
	"fmt"
	"go/types"
	"html/template"
	"image/gif"
	"image/jpeg"
	"image/png"
	"log/slog"
	"net/http"
	"os"
	"time"
)

// kept makes the linker keep what is never called.
var kept = []any{
	tar.NewReader, sql.Open, gob.NewDecoder, xml.NewDecoder, types.NewChecker, template.New,
	dwarf.New, elf.NewFile, gif.Decode, jpeg.Decode, png.Decode, slog.NewJSONHandler, http.ListenAndServe,
}

func main() {
	if len(os.Args) > 1000 { // not known to the compiler
		fmt.Println(kept...)
	}
	fmt.Println("running")
	time.Sleep(time.Hour)
}
