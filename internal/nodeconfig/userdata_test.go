package nodeconfig

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"mime/multipart"
	"mime/quotedprintable"
	"net/textproto"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

func zipped(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func encoded(text string) string {
	word := base64.StdEncoding.EncodeToString([]byte(text))
	var lines []string
	for len(word) > 76 {
		lines, word = append(lines, word[:76]), word[76:]
	}
	return strings.Join(append(lines, word), "\n") + "\n"
}

type mimePart struct{ mediaType, encoding, body string }

func message(t testing.TB, parts ...mimePart) string {
	t.Helper()
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=%q\nMIME-Version: 1.0\n\n", w.Boundary())
	for _, p := range parts {
		header := textproto.MIMEHeader{"Content-Type": {p.mediaType}}
		if p.encoding != "" {
			header.Set("Content-Transfer-Encoding", p.encoding)
		}
		part, err := w.CreatePart(header)
		if err != nil {
			t.Fatal(err)
		}
		body := p.body
		switch p.encoding {
		case "base64":
			body = encoded(body)
		case "quoted-printable":
			var q bytes.Buffer
			qw := quotedprintable.NewWriter(&q)
			_, _ = qw.Write([]byte(body))
			_ = qw.Close()
			body = q.String()
		}
		if _, err := part.Write([]byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func indent(text string) string {
	return "      " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n      ")
}

// userDataForms are ways to say the same document.
func userDataForms(t testing.TB, document string) map[string]struct{ text, origin string } {
	script := mimePart{"text/x-shellscript; charset=\"us-ascii\"", "", "#!/bin/sh\necho kind: NodeConfig\n"}
	file := func(encoding, content string) string {
		return "#cloud-config\npackages: [curl]\nwrite_files:\n  - path: /opt/x\n    content: x\n  - path: /etc/hearth/50-x.yaml\n" + encoding + "    content: " + content + "\n"
	}
	return map[string]struct{ text, origin string }{
		"plain YAML":                         {document, "user-data, line %d"},
		"YAML with a byte order mark":        {"\ufeff" + document, "user-data, line %d"},
		"YAML with carriage returns":         {strings.ReplaceAll(document, "\n", "\r\n"), "user-data, line %d"},
		"gzip":                               {zipped(t, document), "user-data, line %d"},
		"base64":                             {encoded(document), "user-data, line %d"},
		"base64 without padding":             {strings.TrimRight(base64.RawURLEncoding.EncodeToString([]byte(document)), "="), "user-data, line %d"},
		"base64 of gzip":                     {encoded(zipped(t, document)), "user-data, line %d"},
		"a part of our type":                 {message(t, script, mimePart{MediaType, "", document}), "user-data part 2, line %d"},
		"a part of our type with parameters": {message(t, mimePart{MediaType + "; charset=utf-8", "7bit", document}, script), "user-data part 1, line %d"},
		"a part in base64":                   {message(t, script, mimePart{MediaType, "base64", document}), "user-data part 2, line %d"},
		"a part in base64 of gzip":           {message(t, script, mimePart{MediaType, "base64", zipped(t, document)}), "user-data part 2, line %d"},
		"a quoted-printable part":            {message(t, mimePart{MediaType, "quoted-printable", document}), "user-data part 1, line %d"},
		"a part of text":                     {message(t, script, mimePart{"text/plain", "", document}), "user-data part 2, line %d"},
		"a part of YAML":                     {message(t, script, mimePart{"application/yaml", "", document}), "user-data part 2, line %d"},
		"a compressed message":               {zipped(t, message(t, script, mimePart{MediaType, "", document})), "user-data part 2, line %d"},
		"a compressed message in base64":     {encoded(zipped(t, message(t, script, mimePart{MediaType, "", document}))), "user-data part 2, line %d"},
		"a message with a mail's first line": {"From nobody Thu Jan  1 00:00:00 1970\n" + message(t, script, mimePart{MediaType, "", document}), "user-data part 2, line %d"},
		"a message with carriage returns":    {strings.ReplaceAll(strings.ReplaceAll(message(t, script, mimePart{MediaType, "", document}), "\r\n", "\n"), "\n", "\r\n"), "user-data part 2, line %d"},
		"a message in a message":             {nested(message(t, script, mimePart{MediaType, "", document})), "user-data part 2, line %d"},
		"a message of one part":              {"MIME-Version: 1.0\nContent-Type: " + MediaType + "\nContent-Transfer-Encoding: base64\n\n" + encoded(document), "user-data, line %d"},
		"cloud-config":                       {file("", "|\n"+indent(document)), "user-data, write_files /etc/hearth/50-x.yaml, line %d"},
		"cloud-config with base64":           {file("    encoding: b64\n", strings.ReplaceAll(encoded(document), "\n", "")), "user-data, write_files /etc/hearth/50-x.yaml, line %d"},
		"cloud-config with gzip":             {file("    encoding: gz+b64\n", strings.ReplaceAll(encoded(zipped(t, document)), "\n", "")), "user-data, write_files /etc/hearth/50-x.yaml, line %d"},
		"a part of cloud-config":             {message(t, script, mimePart{"text/cloud-config", "", file("", "|\n"+indent(document))}), "user-data part 2, write_files /etc/hearth/50-x.yaml, line %d"},
		"a cloud-config archive":             {"#cloud-config-archive\n- '#!/bin/sh'\n- type: " + MediaType + "\n  content: |\n" + indent(document) + "\n", "user-data part 2, line %d"},
	}
}

// nested puts a message's only container into another one.
func nested(m string) string {
	boundary := fmt.Sprintf("outer%d", len(m))
	return "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=" + boundary + "\n\n--" + boundary + "\n" + m + "\n--" + boundary + "--\n"
}

func TestUserDataInEveryForm(t *testing.T) {
	for name, c := range userDataForms(t, least+"  pool: backend\n") {
		t.Run(name, func(t *testing.T) {
			r, err := Resolve(t.Context(), Sources{UserData: []byte(c.text)})
			if err != nil {
				t.Fatalf("%v\n%s", err, c.text)
			}
			if r.Config.Spec.Pool != v1alpha1.PoolBackend {
				t.Errorf("the pool is %s", r.Config.Spec.Pool)
			}
			if got, want := r.Origins["spec.pool"].String(), fmt.Sprintf(c.origin, 8); got != want {
				t.Errorf("it comes from %q, not %q", got, want)
			}
			if len(r.Notes) > 0 {
				t.Errorf("notes: %v", r.Notes)
			}
		})
	}
}

func TestUserDataProblemsHaveTheirPlace(t *testing.T) {
	for name, c := range userDataForms(t, least+"  pol: backend\n") {
		t.Run(name, func(t *testing.T) {
			_, err := Resolve(t.Context(), Sources{UserData: []byte(c.text)})
			want := fmt.Sprintf(c.origin, 8) + ": spec.pol: unknown field; did you mean role?"
			if fault.CodeOf(err) != CodeInvalid || !strings.Contains(strings.ReplaceAll(err.Error(), "mean pool?", "mean role?"), want) {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
}

func TestPartsAreLayers(t *testing.T) {
	r, err := Resolve(t.Context(), Sources{UserData: []byte(message(t,
		mimePart{MediaType, "", least},
		mimePart{"text/cloud-config", "", "#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml, content: 'apiVersion: hearth.sh/v1alpha1\n\n    kind: NodeConfig\n\n    spec: {timeouts: {join: 2m, fetch: 2m}}'}]\n"},
		mimePart{MediaType, "", spec("timeouts: {fetch: 3m}")},
	))})
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Config.Spec.Timeouts; got.Join != "2m" || got.Fetch != "3m" {
		t.Errorf("got %+v", got)
	}
}

func TestUserDataForSomebodyElseIsNoError(t *testing.T) {
	for name, c := range map[string]struct{ text, note string }{
		"none":                     {"", "there is no user-data"},
		"white space":              {" \n\n", "there is no user-data"},
		"a script":                 {"#!/bin/bash\nkind: NodeConfig\n", "it is a script"},
		"a compressed script":      {zipped(t, "#!/bin/sh\n"), "it is a script"},
		"cloud-config":             {"#cloud-config\npackages: [curl]\n", "a #cloud-config without ours"},
		"cloud-config, other file": {"#cloud-config\nwrite_files: [{path: /etc/hearth/nodeagent.env, content: x}, {path: /etc/x.yaml, content: y}]\n", "a #cloud-config without ours"},
		"damaged cloud-config":     {"#cloud-config\n{a: [\n", "a #cloud-config without ours"},
		"an include":               {"#include\nhttps://x.example\n", "a list of URLs"},
		"a boot hook":              {"#cloud-boothook\n#!/bin/sh\n", "a boot hook"},
		"a template":               {"## template: jinja\n#cloud-config\n", "a template"},
		"an archive of others":     {"#cloud-config-archive\n- type: text/cloud-config\n  content: 'a: b'\n", "a #cloud-config-archive"},
		"another's YAML":           {"apiVersion: v1\nkind: ConfigMap\n", "YAML or JSON of another kind"},
		"nodeadm's NodeConfig":     {"apiVersion: node.eks.aws/v1alpha1\nkind: NodeConfig\nspec: {}\n", "YAML or JSON of another kind"},
		"Ignition":                 {`{"ignition": {"version": "3.0.0"}}`, "YAML or JSON of another kind"},
		"parts of others":          {message(t, mimePart{"text/x-shellscript", "", "#!/bin/sh\n"}, mimePart{"text/plain", "", "hello"}, mimePart{"application/octet-stream", "base64", "\x00\x01"}, mimePart{"application/node.eks.aws", "", "apiVersion: node.eks.aws/v1alpha1\nkind: NodeConfig\n"}), "it is a script, text, binary data, YAML or JSON of another kind"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "a.yaml", least)
			r, err := Resolve(t.Context(), Sources{Dir: dir, UserData: []byte(c.text)})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Notes) != 1 || !strings.Contains(r.Notes[0], c.note) {
				t.Errorf("notes: %q, want %q", r.Notes, c.note)
			}
			_, err = Resolve(t.Context(), Sources{UserData: []byte(c.text)})
			if fault.CodeOf(err) != CodeMissing || !strings.Contains(err.Error(), c.note) {
				t.Errorf("alone: %v", err)
			}
		})
	}
}

func TestDamagedUserDataIsNeverIgnored(t *testing.T) {
	compressed := zipped(t, strings.Repeat(least, 3))
	whole := message(t, mimePart{MediaType, "", least})
	for name, c := range map[string]struct{ text, want string }{
		"too large":                        {strings.Repeat("#", MaxUserDataBytes+1), "EC2 allows at most 16384"},
		"binary":                           {"\x00\x01\x02\x03", "neither UTF-8 text nor gzip"},
		"another character set":            {"pool: \xe9", "neither UTF-8 text nor gzip"},
		"gzip cut off":                     {compressed[:len(compressed)-9], "damaged or cut off"},
		"gzip with a bit changed":          {compressed[:len(compressed)-6] + "X" + compressed[len(compressed)-5:], "damaged or cut off"},
		"gzip's first bytes only":          {"\x1f\x8b", "begins like gzip and is not"},
		"a bomb of gzip":                   {zipped(t, strings.Repeat(" ", 8<<20)), "when decompressed"},
		"base64 cut off":                   {base64.RawStdEncoding.EncodeToString([]byte(least))[:101], "looks like base64 and is not"},
		"base64 of gzip cut off":           {base64.RawStdEncoding.EncodeToString([]byte(compressed[:40])), "damaged or cut off"},
		"base64 of noise":                  {base64.StdEncoding.EncodeToString([]byte("\x80\x00\xff\xfe\x80\x00\xff\xfe\x80\x00\xff\xfe")), "neither text nor gzip"},
		"base64 with a strange character":  {"YXBpVmVyc2lvbjogaGVh!cnRoLnNo", "nothing that this or cloud-init understands"},
		"a text of no kind":                {"hello world", "nothing that this or cloud-init understands (it is plain text)"},
		"damaged YAML of no kind":          {"a: [b\n", "nothing that this or cloud-init understands"},
		"a message cut off":                {whole[:len(whole)-20], "damaged or cut off"},
		"a message without a boundary":     {"MIME-Version: 1.0\nContent-Type: multipart/mixed\n\nx", "names no boundary"},
		"a header that is damaged":         {"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"\n\nx", "Content-Type of its MIME message is damaged"},
		"a message too deep":               {nested(nested(nested(nested(nested(whole))))), "deeper than 4 levels"},
		"a part in base64 that is damaged": {strings.Replace(message(t, mimePart{MediaType, "base64", least}), "YXBp", "!!!!", 1), "does not decode"},
		"a part in an unknown encoding":    {message(t, mimePart{MediaType, "x-uuencode", least}), `"x-uuencode" is not known`},
		"a part of ours that is binary":    {message(t, mimePart{MediaType, "base64", "\x00\x01"}), "is not UTF-8 text"},
		"too many parts":                   {message(t, make([]mimePart, maxParts+1)...), "more than 64 parts"},
		"cloud-config: append":             {"#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml, append: true, content: x}]\n", "append is not understood"},
		"cloud-config: no content":         {"#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml}]\n", "has no content"},
		"cloud-config: encoding":           {"#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml, encoding: rot13, content: x}]\n", `"rot13" is not known`},
		"cloud-config: base64":             {"#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml, encoding: b64, content: '!'}]\n", "base64 does not decode"},
		"cloud-config: gzip":               {"#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml, encoding: gz+b64, content: aGVsbG8=}]\n", "is not gzip"},
		"cloud-config: damaged":            {"#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml, content: [\n", "its cloud-config is damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "a.yaml", least)
			_, err := Resolve(t.Context(), Sources{Dir: dir, UserData: []byte(c.text)})
			if fault.CodeOf(err) != CodeUserData || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "user-data") {
				t.Errorf("got %v (%s), want %q", err, fault.CodeOf(err), c.want)
			}
		})
	}
}

func TestUserDataThatWasMeantForUsIsNotPassedOver(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"another group":              {"apiVersion: heart.sh/v1alpha1\nkind: NodeConfig\nspec: {}\n", `apiVersion: is the text "heart.sh/v1alpha1"`},
		"another version":            {"apiVersion: hearth.sh/v2\nkind: NodeConfig\nspec: {}\n", "this version of bootstrap understands hearth.sh/v1alpha1"},
		"a kind misspelt":            {"apiVersion: hearth.sh/v1alpha1\nkind: Nodeconfig\nspec: {}\n", `kind: is the text "Nodeconfig"`},
		"no apiVersion":              {"kind: NodeConfig\nspec: {}\n", "apiVersion: is missing"},
		"damaged YAML of ours":       {head + "spec: {a: [}\n", "user-data, line 3: it is not YAML"},
		"a damaged part of ours":     {message(t, mimePart{"text/plain", "", head + "spec: {a: [}\n"}), "user-data part 1, line 3: it is not YAML"},
		"a part of our type":         {message(t, mimePart{MediaType, "", "hello"}), "must be a map of apiVersion, kind and spec"},
		"a file of our cloud-config": {"#cloud-config\nwrite_files: [{path: /etc/hearth/x.yaml, content: hello}]\n", "write_files /etc/hearth/x.yaml, line 1: a document must be a map"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "a.yaml", least)
			_, err := Resolve(t.Context(), Sources{Dir: dir, UserData: []byte(c.text)})
			if fault.CodeOf(err) != CodeInvalid || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
