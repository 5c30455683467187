// SPDX-License-Identifier: Apache-2.0
//! Binds the library's calls of its own functions to those: another library may stand before it with the same names.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-Bsymbolic-functions");
}
