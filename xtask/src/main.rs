//! t
mod fetch; mod progress; mod workspace; mod cpio; mod initrd;
fn main(){ let (_q,g) = fetch::everything().unwrap(); std::fs::write("/tmp/xt/i.cpio", initrd::Initrd::interactive().pack(&g).unwrap()).unwrap(); }
