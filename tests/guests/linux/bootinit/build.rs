//! The program starts at its marker, not at the C library's entry.

fn main() {
    println!("cargo::rustc-link-arg-bins=-e");
    println!("cargo::rustc-link-arg-bins=bootinit_start");
    println!("cargo::rerun-if-changed=build.rs");
}
