package wasm_test
import ("testing";"os";"github.com/hearth-sh/hearth/internal/wasm")
func TestZZLower(t *testing.T){
 in,out:=os.Getenv("ZZ_IN"),os.Getenv("ZZ_OUT")
 if in=="" {t.Skip()}
 b,err:=os.ReadFile(in); if err!=nil{t.Fatal(err)}
 l:=mustLower(t,b,wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true})
 t.Log(len(b),len(l.Bytes),l.Checks)
 os.WriteFile(out,l.Bytes,0o644)
}
