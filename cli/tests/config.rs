//! Configurations as files: what is wrong with them is told by name, what is right becomes a bundle.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use entresol_cli::{bundle, config};
use entresol_wire::bundle::Bundle;
use entresol_wire::config::{Console, LargestEntry, OnReset, UnclaimedMmio};
use tempfile::TempDir;

/// The header of an arm64 `Image` that needs 64 KiB (Linux, Documentation/arch/arm64/booting.rst), and nothing else.
fn image() -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[..4].copy_from_slice(&0x1400_0010_u32.to_le_bytes());
    image[16..24].copy_from_slice(&0x1_0000_u64.to_le_bytes());
    image[24..32].copy_from_slice(&0b1010_u64.to_le_bytes());
    image[56..60].copy_from_slice(b"ARM\x64");
    image
}

/// A folder with files to name.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let put = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).expect("written");
    put("Image", &image());
    put("initrd", &[1; 10_000]);
    put("disk", &[2; 1024]);
    put("odd", &[3; 1000]);
    put("text", b"hello, this is not a kernel\n");
    put("flat.bin", &[0x1f, 0x20, 0x03, 0xd5]);
    put("empty", b"");
    put("large", &vec![4; 3 << 20]);
    folder
}

fn written(folder: &TempDir, toml: &str) -> std::path::PathBuf {
    let path = folder.path().join("vms.toml");
    fs::write(&path, toml).expect("written");
    path
}

fn refusal(toml: &str) -> String {
    let folder = folder();
    let error = config::load(&written(&folder, toml)).and_then(|loaded| bundle::pack(&loaded).map(drop));
    error.expect_err(toml).to_string().replace(&folder.path().display().to_string(), "DIR")
}

#[test]
fn every_key_is_understood() {
    let folder = folder();
    let path = written(
        &folder,
        r#"
        [outer]
        memory = "1G"
        cpus = 4

        [[vms]]
        name = "web"
        memory = "64M"
        vcpus = 8
        kernel = "Image"
        kernel_format = "auto"
        initrd = "initrd"
        cmdline = "console=ttyAMA0"
        disks = [{ file = "disk", read_only = true }, { file = "disk" }]
        policies = { unclaimed_mmio = "read-as-zero", page_size = "4K", console = "background", on_guest_reset = "stop" }
        autostart = false

        [[vms]]
        name = "db"
        memory = "4M"
        kernel = "flat.bin"
        "#,
    );
    let loaded = config::load(&path).expect("right");
    let config = loaded.config();
    assert_eq!((config.outer.memory, config.outer.cpus), (1 << 30, 4));
    let web = &config.vms[0];
    assert_eq!((web.vcpus, web.autostart, web.disks.len()), (8, false, 2));
    assert_eq!(web.policies.unclaimed_mmio, UnclaimedMmio::ReadAsZero);
    assert_eq!(web.policies.page_size, LargestEntry::Page4K);
    assert_eq!(web.policies.on_guest_reset, OnReset::Stop);
    assert_eq!(
        config.vms.iter().map(|vm| vm.policies.console).collect::<Vec<_>>(),
        [Console::Background, Console::Foreground]
    );
}

#[test]
fn each_mistake_has_its_message() {
    let one = |more: &str| refusal(&format!("[[vms]]\nname = 'a'\nmemory = '64M'\nkernel = 'Image'\n{more}"));
    let rule = |text: String| text.strip_prefix("DIR/vms.toml: ").map(str::to_owned).expect("the file's name");
    assert_eq!(rule(refusal("vms = []")), "vms = []: must list at least one virtual machine");
    assert!(one("memroy = '1G'").contains("unknown field `memroy`"));
    assert!(one("memroy = '1G'").contains("line 5"), "{}", one("memroy = '1G'"));
    assert!(one("vcpus = 'two'").contains("invalid type: string \"two\", expected i64"));
    assert!(
        one("policies.unclaimed_mmio = 'ignore'")
            .contains("unknown variant `ignore`, expected `abort` or `read-as-zero`")
    );
    assert!(one("name = 'b'").contains("duplicate key"));
    assert!(refusal("[[vms]]\nname = 'a'\nmemory = '64M'").contains("missing field `kernel`"));
    assert_eq!(rule(one("vcpus = 0")), "vms[0].vcpus = 0: must be from 1 to 8");
    assert_eq!(rule(one("vcpus = 9")), "vms[0].vcpus = 9: must be from 1 to 8");
    assert_eq!(
        rule(one("initrd = 'gone'")),
        "vms[0].initrd = \"gone\": must be a file that can be read: No such file or directory (os error 2)"
    );
    assert_eq!(
        rule(one("initrd = '.'")),
        "vms[0].initrd = \".\": must be a file that can be read: it is not a regular file"
    );
    assert_eq!(rule(one("initrd = 'empty'")), "vms[0].initrd = \"empty\": must not be empty");
    assert_eq!(
        rule(one("disks = [{ file = 'odd' }]")),
        "vms[0].disks[0].file = \"odd\": must be whole sectors of 512 bytes: it has 1000 bytes"
    );
    let memory = |size: &str| rule(refusal(&format!("[[vms]]\nname = 'a'\nmemory = '{size}'\nkernel = 'Image'")));
    assert_eq!(memory("3M"), "vms[0].memory = 3M: must be a multiple of 2M");
    assert_eq!(memory("8G"), "vms[0].memory = 8G: must be at most the machine's: outer.memory = 4G");
    let twice = "[[vms]]\nname = 'a'\nmemory = '64M'\nkernel = 'Image'\n".repeat(2);
    assert!(rule(refusal(&twice)).starts_with("vms[1].name = \"a\": must differ from every other VM's name"));
}

#[test]
fn kernels_are_looked_at_before_anything_starts() {
    let kernel =
        |file: &str, memory: &str| refusal(&format!("[[vms]]\nname = 'a'\nmemory = '{memory}'\nkernel = '{file}'"));
    assert!(
        kernel("text", "64M").contains("vms[0].kernel = \"text\": not a kernel: a text file"),
        "{}",
        kernel("text", "64M")
    );
    assert!(kernel("large", "64M").contains("vms[0].kernel = \"large\": not a kernel"));
    assert!(kernel("large", "2M").contains("vms[0].kernel = \"large\": must fit into the VM's memory"));
    let small = kernel("Image", "2M");
    assert!(small.contains("vms[0].kernel = \"Image\": must fit into vms[0].memory = 2M: "), "{small}");
}

#[test]
fn a_bundle_larger_than_the_machine_is_refused() {
    let folder = folder();
    let disk = fs::File::create(folder.path().join("huge")).expect("a file");
    disk.set_len(129 << 20).expect("a sparse file");
    let path = written(
        &folder,
        "[outer]\nmemory = '256M'\n[[vms]]\nname = 'a'\nmemory = '64M'\nkernel = 'Image'\ndisks = [{ file = 'huge' }]",
    );
    let loaded = config::load(&path).expect("right by itself");
    let error = bundle::pack(&loaded).expect_err("too large").to_string();
    assert!(error.contains("outer.memory = 256M: must hold the boot bundle (1352"), "{error}");
}

#[test]
fn shared_files_are_packed_once_and_writable_disks_each() {
    let folder = folder();
    let vm = |name: &str| {
        format!(
            "[[vms]]\nname = '{name}'\nmemory = '64M'\nkernel = 'Image'\ninitrd = './initrd'\ndisks = [{{ file = 'disk' }}]\n"
        )
    };
    let path = written(&folder, &(vm("a") + &vm("b")));
    let loaded = config::load(&path).expect("right");
    let output = folder.path().join("bundle");
    let mut reports = Vec::new();
    let total = bundle::write(&loaded, &output, &mut |done, all| reports.push((done, all))).expect("written");
    let bytes = fs::read(&output).expect("there");
    assert_eq!(bytes.len() as u64, total);
    assert_eq!(reports.last(), Some(&(total, total)));
    let read = Bundle::parse(&bytes).expect("right");
    assert_eq!(read.files().map(|file| file.name).collect::<Vec<_>>(), ["Image", "initrd", "disk", "disk"]);
    let [a, b] = &read.config().vms[..] else { panic!("two VMs") };
    assert_eq!((a.kernel, a.initrd), (b.kernel, b.initrd));
    assert_ne!(a.disks[0].file, b.disks[0].file);
    assert_eq!(read.file(a.kernel).map(|file| file.data.to_vec()), Some(image()));
    assert_eq!(read.file(b.disks[0].file).map(|file| file.data), Some(&[2; 1024][..]));
}

#[test]
fn an_input_is_never_overwritten() {
    let folder = folder();
    let path = written(&folder, "[[vms]]\nname = 'a'\nmemory = '64M'\nkernel = 'Image'");
    let loaded = config::load(&path).expect("right");
    let error = bundle::write(&loaded, &folder.path().join("Image"), &mut |_, _| ()).expect_err("refused").to_string();
    assert!(error.ends_with("Image: it is vms[0].kernel, which the bundle is made of"), "{error}");
    assert_eq!(fs::read(folder.path().join("Image")).expect("there"), image());
}

fn entresol(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_entresol")).current_dir(folder).args(arguments).output().expect("it starts")
}

#[test]
fn the_program_says_and_ends_as_documented() {
    let folder = folder();
    written(&folder, "[[vms]]\nname = 'a'\nmemory = '64M'\nkernel = 'Image'");
    let right = entresol(folder.path(), &["check", "--config", "vms.toml"]);
    let said = String::from_utf8(right.stdout).expect("text");
    assert_eq!((right.status.code(), said.lines().next()), (Some(0), Some("a: vcpus 1, memory 64M, kernel Image")));
    let packed = entresol(folder.path(), &["bundle", "--config", "vms.toml", "-o", "out"]);
    assert_eq!((packed.status.code(), packed.stdout.len(), packed.stderr.len()), (Some(0), 0, 0));
    assert!(Bundle::parse(&fs::read(folder.path().join("out")).expect("there")).is_ok());
    written(&folder, "[[vms]]\nname = 'a'\nmemory = '63M'\nkernel = 'Image'");
    let wrong = entresol(folder.path(), &["bundle", "--config", "vms.toml", "-o", "none"]);
    assert_eq!(wrong.status.code(), Some(2));
    let said = String::from_utf8(wrong.stderr).expect("text");
    assert_eq!(said, "entresol: vms.toml: vms[0].memory = 63M: must be a multiple of 2M\n");
    assert!(!folder.path().join("none").exists());
    assert_eq!(entresol(folder.path(), &["check", "--config", "absent.toml"]).status.code(), Some(2));
    assert_eq!(entresol(folder.path(), &["bundle"]).status.code(), Some(2));
}
