// SPDX-License-Identifier: Apache-2.0
//! Builds what `softkvm exec` puts into clients, for maturin to put it into the package beside the extension module.

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// The packages, and the files that they are.
const CLIENT: [(&str, &str); 2] =
    [("softkvm-preload", "libsoftkvm_preload.so"), ("softkvm-loader", "softkvm-load")];

fn main() {
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let client = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("../../client");
    println!("cargo::rerun-if-changed={}", client.display());
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(variable("OUT_DIR"));
    // A target directory of its own: this build holds the lock of the other.
    let target = out.join("client");
    for (package, file) in CLIENT {
        let status = Command::new(variable("CARGO"))
            .args(["build", "--profile", "client", "--quiet", "--package", package])
            .args(["--manifest-path".into(), client.join("../Cargo.toml")])
            .args(["--target-dir".into(), target.clone()])
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status()
            .unwrap_or_else(|error| panic!("cargo: {error}"));
        assert!(status.success(), "{package} does not build");
        std::fs::copy(target.join("client").join(file), out.join(file))
            .unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}
