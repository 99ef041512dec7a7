//! Containerd shims for tests, on runwasi's public library: one that really
//! runs WebAssembly, with Wasmtime and runwasi's compile cache, and some that
//! are wrong in one way each, which a node must not mistake for it.

use std::hash::Hash;
use std::io::Write;

use anyhow::{Result, anyhow, bail};
use containerd_shim_wasm::sandbox::Sandbox;
use containerd_shim_wasm::sandbox::context::{Entrypoint, RuntimeContext, WasmLayer};
use containerd_shim_wasm::shim::{Cli, Compiler, Config, Shim, Version};
use wasmtime::{Engine, Linker, Module, Store};
use wasmtime_wasi::p1::{self, WasiP1Ctx};
use wasmtime_wasi::{I32Exit, WasiCtxBuilder};

/// The first bytes of every binary module and component.
const WASM_MAGIC: &[u8] = b"\0asm";

/// Runs `S` as the shim that containerd started.
pub fn run<S: Shim>() {
    S::run(None::<Config>);
}

/// A revision would come from the repository the shim is built in; the package
/// version is enough, and the same wherever the build runs.
fn version() -> Version {
    Version {
        version: env!("CARGO_PKG_VERSION"),
        revision: "<none>",
    }
}

/// `containerd-shim-wasmtime-v1`: runs wasip1 commands.
pub struct WasmtimeShim;

impl Shim for WasmtimeShim {
    type Sandbox = WasmtimeSandbox;

    fn name() -> &'static str {
        "wasmtime"
    }

    fn version() -> Version {
        version()
    }

    async fn compiler() -> Option<impl Compiler> {
        Some(WasmtimeCompiler(Engine::default()))
    }
}

/// Compiles modules once per engine; runwasi keeps the result in containerd's
/// content store under labels made from the cache key.
pub struct WasmtimeCompiler(Engine);

impl Compiler for WasmtimeCompiler {
    fn cache_key(&self) -> impl Hash {
        self.0.precompile_compatibility_hash()
    }

    async fn compile(&self, layers: &[WasmLayer]) -> Result<Vec<Option<Vec<u8>>>> {
        let mut compiled = Vec::with_capacity(layers.len());
        for layer in layers {
            compiled.push(if layer.precompiled {
                None
            } else {
                let code = self.0.precompile_module(wasm_bytes(&layer.layer)?);
                Some(code.map_err(plain)?)
            });
        }
        Ok(compiled)
    }
}

/// Refuses what is not WebAssembly. Above all a serialized native artifact in
/// an image: only what runwasi marked as compiled by this shim may be loaded
/// as code.
fn wasm_bytes(bytes: &[u8]) -> Result<&[u8]> {
    if !bytes.starts_with(WASM_MAGIC) {
        bail!("the layer is not a WebAssembly binary");
    }
    Ok(bytes)
}

/// Wasmtime's errors are not anyhow's; runwasi's are.
fn plain(error: wasmtime::Error) -> anyhow::Error {
    anyhow!("{error:#}")
}

#[derive(Default)]
pub struct WasmtimeSandbox {
    engine: Engine,
}

impl Sandbox for WasmtimeSandbox {
    async fn run_wasi(&self, ctx: &impl RuntimeContext) -> Result<i32> {
        let Entrypoint { source, func, .. } = ctx.entrypoint();
        let bytes = source.as_bytes()?;
        let module = if source.is_precompiled()? {
            // SAFETY: runwasi says that these bytes came out of our compile(),
            // and Wasmtime refuses those of another engine or configuration.
            unsafe { Module::deserialize(&self.engine, &bytes) }
        } else {
            Module::from_binary(&self.engine, wasm_bytes(&bytes)?)
        }
        .map_err(plain)?;

        let mut wasi = WasiCtxBuilder::new();
        wasi.inherit_stdio().args(ctx.args());
        for variable in ctx.envs() {
            let (key, value) = variable.split_once('=').unwrap_or((variable, ""));
            wasi.env(key, value);
        }
        let mut linker: Linker<WasiP1Ctx> = Linker::new(&self.engine);
        p1::add_to_linker_async(&mut linker, |wasi| wasi).map_err(plain)?;
        let mut store = Store::new(&self.engine, wasi.build_p1());

        let instance = linker.instantiate_async(&mut store, &module).await;
        let instance = instance.map_err(plain)?;
        let entry = instance
            .get_typed_func::<(), ()>(&mut store, &func)
            .map_err(|error| anyhow!("the module has no function {func}: {error:#}"))?;
        match entry.call_async(&mut store, ()).await {
            Ok(()) => Ok(0),
            Err(error) => match error.downcast_ref::<I32Exit>() {
                Some(exit) => Ok(exit.0),
                None => Err(plain(error)),
            },
        }
    }
}

/// Declares a shim without a compiler whose sandbox does one wrong thing.
macro_rules! faulty_shim {
    ($(#[$doc:meta])* $shim:ident, $sandbox:ident, $name:literal) => {
        $(#[$doc])*
        pub struct $shim;

        #[derive(Default)]
        pub struct $sandbox;

        impl Shim for $shim {
            type Sandbox = $sandbox;

            fn name() -> &'static str {
                $name
            }

            fn version() -> Version {
                version()
            }
        }
    };
}

faulty_shim!(
    /// `containerd-shim-hollow-v1`: every container exits 0, nothing ran.
    HollowShim, HollowSandbox, "hollow"
);

impl Sandbox for HollowSandbox {
    async fn run_wasi(&self, _: &impl RuntimeContext) -> Result<i32> {
        Ok(0)
    }
}

faulty_shim!(
    /// `containerd-shim-broken-v1`: no task can be created.
    BrokenShim, BrokenSandbox, "broken"
);

impl Sandbox for BrokenSandbox {
    async fn can_handle(&self, _: &impl RuntimeContext) -> Result<()> {
        bail!("broken on purpose")
    }

    async fn run_wasi(&self, _: &impl RuntimeContext) -> Result<i32> {
        bail!("broken on purpose")
    }
}

faulty_shim!(
    /// `containerd-shim-stuck-v1`: containers start and never end.
    StuckShim, StuckSandbox, "stuck"
);

impl Sandbox for StuckSandbox {
    async fn run_wasi(&self, _: &impl RuntimeContext) -> Result<i32> {
        loop {
            std::thread::park();
        }
    }
}

faulty_shim!(
    /// `containerd-shim-chatty-v1`: containers write without end.
    ChattyShim, ChattySandbox, "chatty"
);

impl Sandbox for ChattySandbox {
    async fn run_wasi(&self, _: &impl RuntimeContext) -> Result<i32> {
        let line = [b'y'; 4096];
        loop {
            std::io::stdout().write_all(&line)?;
        }
    }
}
