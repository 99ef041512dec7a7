package kube_test

import (
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/hearth-sh/hearth/internal/kube"
)

// fill sets everything that v holds, with one element wherever there may be
// any number. A field that is added tomorrow is filled, too.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(key)
		fill(value)
		v.SetMapIndex(key, value)
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)))
			return
		}
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				fill(f)
			}
		}
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(7)
	case reflect.Float32, reflect.Float64:
		v.SetFloat(7)
	}
}

// shares reports what two equal values have in common in memory.
func shares(t *testing.T, path string, a, b reflect.Value) {
	t.Helper()
	switch a.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		if a.IsNil() || b.IsNil() || a.Kind() == reflect.Slice && a.Len() == 0 {
			return
		}
		if a.Pointer() == b.Pointer() {
			t.Errorf("the copy shares %s", path)
			return
		}
	}
	switch a.Kind() {
	case reflect.Pointer:
		shares(t, path, a.Elem(), b.Elem())
	case reflect.Slice:
		shares(t, path+"[0]", a.Index(0), b.Index(0))
	case reflect.Map:
		for _, key := range a.MapKeys() {
			shares(t, path+"["+key.String()+"]", a.MapIndex(key), b.MapIndex(key))
		}
	case reflect.Struct:
		if a.Type() == reflect.TypeFor[time.Time]() {
			return // its location belongs to everyone
		}
		for i := range a.NumField() {
			if f := a.Type().Field(i); f.IsExported() {
				shares(t, path+"."+f.Name, a.Field(i), b.Field(i))
			}
		}
	}
}

func TestACopyIsEqualAndSharesNothing(t *testing.T) {
	for _, o := range []runtime.Object{&kube.Function{}, &kube.FunctionList{}, &kube.Host{}, &kube.HostList{}} {
		v := reflect.ValueOf(o).Elem()
		t.Run(v.Type().Name(), func(t *testing.T) {
			fill(v)
			c := o.DeepCopyObject()
			if diff := cmp.Diff(o, c); diff != "" {
				t.Errorf("the copy differs (-original +copy):\n%s", diff)
			}
			shares(t, v.Type().Name(), v, reflect.ValueOf(c).Elem())
		})
	}
}

func TestTheCopyOfNoObjectIsNone(t *testing.T) {
	for _, o := range []runtime.Object{(*kube.Function)(nil), (*kube.FunctionList)(nil), (*kube.Host)(nil), (*kube.HostList)(nil)} {
		if c := o.DeepCopyObject(); c != nil {
			t.Errorf("the copy of no %T is %v", o, c)
		}
	}
}
