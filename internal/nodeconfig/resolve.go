package nodeconfig

import (
	"bytes"
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Instance is what the configuration needs to know of the machine. It comes
// from the one snapshot of instance metadata that everything uses.
type Instance struct {
	// Region is the AWS region, such as eu-central-1.
	Region string
	// Arch is arm64 or amd64.
	Arch string
	// Spot says that the instance may be taken away.
	Spot bool
}

// Sources is where documents are looked for, the later ones win: the profile
// of the pool, Dir, UserData, Tags. The zero value has none but the profile.
type Sources struct {
	// Files are read instead of Dir, UserData and Tags, in this order: what
	// --config names.
	Files []string
	// Dir has the files *.yaml, read in the order of their names. It need not
	// exist. Empty: none; see ConfigDir.
	Dir string
	// UserData is the instance's user-data as instance metadata returns it.
	UserData []byte
	// Tags are the instance's tags; nil when they are not known.
	Tags map[string]string
	// Instance is nil when there is none, such as on the machine of somebody
	// who checks a file. Fields whose default comes from it then stay empty.
	Instance *Instance
}

// Resolved is a complete and valid configuration.
type Resolved struct {
	// Config has every default filled in but those that need an instance or
	// the manifest of artifacts, where these were not known.
	Config *v1alpha1.NodeConfig
	// Origins has for every value, by its path such as
	// spec.artifacts.files[0].sha256, where it came from.
	Origins map[string]Origin
	// Notes say what was read and not used, in whole sentences without the
	// full stop.
	Notes []string
	// Signal is set beside an error: who waits for the instance, as far as that
	// could be read and is valid by itself.
	Signal v1alpha1.SignalConfig

	tree     *node
	instance *Instance
}

// Resolve reads the sources, lays them over each other, fills in defaults and
// checks the result. Its error is a *fault.Error with one of this package's
// codes, whose cause is an *Invalid that lists all problems at once.
func Resolve(ctx context.Context, s Sources) (Resolved, error) {
	var ps problems
	documents, err := s.read(ctx, &ps)
	if err != nil {
		return Resolved{}, err
	}
	if len(documents) == 0 && len(ps.list) == 0 {
		ps.add(Problem{Message: "none of the sources has one" + noteList(ps.notes), code: CodeMissing})
		return Resolved{}, ps.err()
	}
	return assemble(documents, s, &ps)
}

// assemble lays the documents over the profile of their pool.
func assemble(documents []*node, s Sources, ps *problems) (Resolved, error) {
	pool := v1alpha1.PoolWasm
	for _, d := range documents {
		if said := d.at("spec", "pool"); said != nil {
			pool = v1alpha1.NodePool(said.text())
		}
	}
	tree := builtIn("layers/defaults.yaml", defaultSource)
	if slices.Contains(pools, pool) {
		tree = merge(tree, builtIn("layers/"+string(pool)+".yaml", "built-in profile "+string(pool)), "")
	}
	for _, d := range documents {
		tree = merge(tree, d, "")
	}
	tree = ordered(derive(tree, s), reflect.TypeFor[v1alpha1.NodeConfig]())
	config, err := decode(tree)
	if err != nil {
		return Resolved{}, err
	}
	newValidator(ps, tree, config, s.Instance).validate()
	if err := ps.err(); err != nil {
		return Resolved{Signal: ps.signal(config)}, err
	}
	r := Resolved{Config: config, Origins: map[string]Origin{}, Notes: ps.notes, tree: tree, instance: s.Instance}
	tree.walk("", func(path string, n *node) { r.Origins[path] = n.origin })
	return r, nil
}

// signal is what is said of signals, unless something is wrong with that.
func (ps *problems) signal(config *v1alpha1.NodeConfig) v1alpha1.SignalConfig {
	const path = "spec.signal"
	if slices.ContainsFunc(ps.list, func(p Problem) bool { return p.Path == path || strings.HasPrefix(p.Path, path+".") }) {
		return v1alpha1.SignalConfig{}
	}
	return config.Spec.Signal
}

func noteList(notes []string) string {
	if len(notes) == 0 {
		return ""
	}
	return " (" + strings.Join(notes, "; ") + ")"
}

// read returns the documents of all sources, in their order.
func (s Sources) read(ctx context.Context, ps *problems) ([]*node, error) {
	files := s.Files
	if len(s.Files) == 0 {
		files = s.directory(ps)
	}
	if len(files) > MaxFiles {
		ps.add(Problem{Message: fmt.Sprintf("there are %d files; at most %d are read", len(files), MaxFiles), code: CodeUnreadable})
		files = nil
	}
	var out []*node
	for _, name := range files {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		o := Origin{Source: name}
		text, err := readFile(name)
		if err != nil {
			ps.add(Problem{Origin: o, Message: err.Error(), code: CodeUnreadable})
			continue
		}
		found := accept(parseYAML(text, o, ps), ps, true)
		if len(found) == 0 {
			ps.notes = append(ps.notes, "no NodeConfig in "+name)
		}
		out = append(out, found...)
	}
	if len(s.Files) > 0 {
		return out, nil
	}
	out = append(out, userData(s.UserData, ps)...)
	if d := tagDocument(s.Tags, ps); d != nil {
		out = append(out, d)
	}
	return out, nil
}

// directory lists the files of Dir. A file that was meant to be read and has
// another ending would otherwise go unnoticed.
func (s Sources) directory(ps *problems) []string {
	if s.Dir == "" {
		return nil
	}
	entries, err := os.ReadDir(s.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		ps.add(Problem{Origin: Origin{Source: s.Dir}, Message: plainError(err), code: CodeUnreadable})
		return nil
	}
	var out []string
	for _, e := range entries {
		name := filepath.Join(s.Dir, e.Name())
		switch {
		case e.IsDir() || strings.HasPrefix(e.Name(), "."):
		case filepath.Ext(name) == ".yaml":
			out = append(out, name)
		case filepath.Ext(name) == ".yml" || filepath.Ext(name) == ".json":
			ps.add(Problem{Origin: Origin{Source: name}, Message: "only files *.yaml are read; rename it or take it away"})
		}
	}
	return out
}

func readFile(name string) ([]byte, error) {
	// Looked at before it is opened: opening a pipe waits for its writer.
	info, err := os.Stat(name)
	if err != nil {
		return nil, errors.New(plainError(err))
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case info.Mode().Perm()&0o002 != 0:
		return nil, errors.New("everybody may write it, and it decides what runs as root; chmod o-w")
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, errors.New(plainError(err))
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, MaxDocumentBytes+1))
	if err != nil {
		return nil, errors.New(plainError(err))
	}
	if len(text) > MaxDocumentBytes {
		return nil, fmt.Errorf("it has more than %d bytes", MaxDocumentBytes)
	}
	return text, nil
}

// plainError leaves out the path, which the problem's origin has.
func plainError(err error) string {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		return pathError.Err.Error()
	}
	return err.Error()
}

//go:embed layers/*.yaml
var layers embed.FS

// builtIn is a document of this package. Its values have no line: nobody can
// change them there.
func builtIn(name, source string) *node {
	text, err := layers.ReadFile(name)
	if err != nil {
		panic("nodeconfig: " + err.Error())
	}
	var ps problems
	documents := accept(parseYAML(text, Origin{Source: source}, &ps), &ps, true)
	if len(ps.list) > 0 || len(documents) != 1 {
		panic(fmt.Sprintf("nodeconfig: %s is not valid: %v", name, ps.list))
	}
	return documents[0].withoutLines()
}

func (n *node) withoutLines() *node {
	out := *n
	out.origin.Line = 0
	out.fields, out.items = slices.Clone(n.fields), slices.Clone(n.items)
	for i := range out.fields {
		out.fields[i].origin.Line = 0
		out.fields[i].value = out.fields[i].value.withoutLines()
	}
	for i := range out.items {
		out.items[i] = out.items[i].withoutLines()
	}
	return &out
}

// ordered puts fields in the order of their types and keys of maps in
// alphabetical order, so that layers leave no trace in what is printed.
func ordered(n *node, typ reflect.Type) *node {
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	out := *n
	out.fields, out.items = slices.Clone(n.fields), slices.Clone(n.items)
	inside := func(string) reflect.Type { return reflect.TypeFor[any]() }
	rank := map[string]int{}
	switch typ.Kind() {
	case reflect.Struct:
		byName := members(typ)
		inside = func(key string) reflect.Type { return byName[key].Type }
		for name, f := range byName {
			rank[name] = f.Index[0]
		}
	case reflect.Map, reflect.Slice:
		inside = func(string) reflect.Type { return typ.Elem() }
	}
	slices.SortStableFunc(out.fields, func(a, b field) int {
		return cmp.Or(cmp.Compare(rank[a.key], rank[b.key]), cmp.Compare(a.key, b.key))
	})
	for i := range out.fields {
		out.fields[i].value = ordered(out.fields[i].value, inside(out.fields[i].key))
	}
	for i := range out.items {
		out.items[i] = ordered(out.items[i], inside(""))
	}
	return &out
}

func decode(tree *node) (*v1alpha1.NodeConfig, error) {
	text, err := json.Marshal(tree.plain())
	if err != nil {
		return nil, fmt.Errorf("encode the configuration: %w", err)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	config := new(v1alpha1.NodeConfig)
	if err := decoder.Decode(config); err != nil {
		return nil, fmt.Errorf("decode the configuration: %w", err)
	}
	return config, nil
}
