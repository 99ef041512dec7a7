package wasm_test
import ("testing";"os";"github.com/hearth-sh/hearth/internal/wasm";"time";"io";"sort";"github.com/tetratelabs/wazero";"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1")
func TestZZDump(t *testing.T){
 g,err:=goGuest(); if err!=nil{t.Fatal(err)}
 m,_:=os.ReadFile("/tmp/micro.wasm")
 os.WriteFile("/tmp/v_plain.go.wasm",g,0644); os.WriteFile("/tmp/v_plain.c.wasm",m,0644)
 o:=wasm.LowerOptions{Limits:wasm.DefaultLimits(),InterruptChecks:true}
 os.WriteFile("/tmp/v_"+os.Getenv("V")+".go.wasm",mustLower(t,g,o).Bytes,0644)
 os.WriteFile("/tmp/v_"+os.Getenv("V")+".c.wasm",mustLower(t,m,o).Bytes,0644)
}
func TestZZCmp(t *testing.T){
 vs:=[]string{"plain","lease","global"}
 r:=newRuntime(t); wasi_snapshot_preview1.MustInstantiate(t.Context(),r)
 var cs []wazero.CompiledModule
 for _,v:=range vs { b,_:=os.ReadFile("/tmp/v_"+v+".go.wasm"); c,err:=r.CompileModule(t.Context(),b); if err!=nil{t.Fatal(err)}; cs=append(cs,c)}
 ds:=make([][]time.Duration,3)
 for k:=0;k<40;k++{ for i,c:=range cs { s:=time.Now(); r.InstantiateModule(t.Context(),c,wazero.NewModuleConfig().WithName("").WithArgs("c","2").WithStdout(io.Discard)); ds[i]=append(ds[i],time.Since(s)) } }
 for i:=range ds { sort.Slice(ds[i],func(a,b int)bool{return ds[i][a]<ds[i][b]}); t.Logf("GO %s min %v p25 %v median %v", vs[i],ds[i][0],ds[i][10],ds[i][20]) }
 for _,c:=range []struct{n string;a uint64}{{"fib",27},{"sieve",1},{"sum",3000000},{"mat",100},{"copies",300000},{"interp",1000000}}{
  for i:=range vs { ds[i]=nil }
  var ms []interface{}; _ = ms
  a,b2,c3:=instantiate(t,r,rd("plain")),instantiate(t,r,rd("lease")),instantiate(t,r,rd("global"))
  for k:=0;k<60;k++ { for i,m:=range []interface{}{0,1,2} { _ = m; mm:=a; if i==1 {mm=b2}; if i==2 {mm=c3}; s:=time.Now(); mm.ExportedFunction(c.n).Call(t.Context(),c.a); ds[i]=append(ds[i],time.Since(s)) } }
  for i:=range ds { sort.Slice(ds[i],func(x,y int)bool{return ds[i][x]<ds[i][y]}) }
  t.Logf("C %s plain %v lease %+.0f%% global %+.0f%% (min) | p25 lease %+.0f%% global %+.0f%%",c.n,ds[0][0],100*(float64(ds[1][0])/float64(ds[0][0])-1),100*(float64(ds[2][0])/float64(ds[0][0])-1),100*(float64(ds[1][15])/float64(ds[0][15])-1),100*(float64(ds[2][15])/float64(ds[0][15])-1))
 }
}
func rd(v string) []byte { b,_:=os.ReadFile("/tmp/v_"+v+".c.wasm"); return b }
