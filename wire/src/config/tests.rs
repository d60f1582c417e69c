//! Every rule of the configuration, broken once.

use std::format;
use std::string::{String, ToString};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::Refusal;

/// A disk of the host's: sizes by name, everything else is missing.
fn on_disk(path: &str) -> Result<u64, String> {
    match path {
        "Image" | "u-boot.bin" => Ok(30 << 20),
        "initrd" => Ok(10 << 20),
        "disk" => Ok(64 << 20),
        "odd" => Ok(513),
        "empty" => Ok(0),
        "firmware" => Ok(2 << 20),
        "page" => Ok(100),
        "vars" => Ok(1 << 20),
        "bank" => Ok(64 << 20),
        "huge" => Ok((64 << 20) + (256 << 10)),
        _ => Err("no such file".to_string()),
    }
}

fn check(value: Value) -> Result<Config<String>, Refusal> {
    let written: Written = serde_json::from_value(value).expect("a shape that the test means to be right");
    written.check(&mut |path| on_disk(path))
}

/// One VM that is right, with `change` laid over it.
fn vm(change: Value) -> Value {
    let mut vm = json!({ "name": "a", "memory": "512M", "vcpus": 2, "kernel": "Image" });
    for (key, value) in change.as_object().expect("an object") {
        vm[key] = value.clone();
    }
    vm
}

fn one(change: Value) -> Value {
    json!({ "vms": [vm(change)] })
}

/// Who is above what it is to keep gives first, among those who has the lowest priority, among those who has most.
#[test]
fn memory_is_taken_by_rank() {
    let yields = |low, priority, resident| Limits { max: None, low, priority }.yields(resident);
    let (plain, large, kept, low, first) =
        (yields(0, 100, 50), yields(0, 100, 60), yields(80, 100, 80), yields(30, 100, 85), yields(0, 99, 1));
    assert!(first > large && large > low && low > plain && plain > kept);
    assert_eq!([large, low, kept].map(|yields| yields.expect("it has some").bytes), [60, 55, 80]);
    assert_eq!(yields(10, 0, 0), None);
}

#[test]
fn defaults_are_as_documented() {
    let config = check(json!({ "vms": [{ "name": "a", "memory": "512M", "kernel": "Image" }] })).expect("right");
    let expected = Vm {
        name: "a".to_string(),
        memory: 512 << 20,
        private: false,
        limits: Limits { max: None, low: 0, priority: 100 },
        private_io: PrivateIo::Lease,
        vcpus: 1,
        kernel: "Image".to_string(),
        kernel_format: KernelFormat::Auto,
        initrd: None,
        cmdline: String::new(),
        disks: [].into(),
        roms: [].into(),
        flash: None,
        coalesced_mmio: [].into(),
        doorbells: [].into(),
        pass_through: [].into(),
        balloon: false,
        mte: false,
        policies: Policies { console: Console::Foreground, ..Policies::default() },
        autostart: true,
        merge: false,
    };
    assert_eq!(
        config,
        Config {
            outer: Outer {
                memory: 4 << 30,
                cpus: 2,
                housekeeping_cpus: 0,
                arch: Arch::Arm64,
                merge_pages_per_second: 5_000
            },
            vms: [expected].into()
        }
    );
}

#[test]
fn each_broken_rule_names_field_value_and_rule() {
    let many: std::vec::Vec<Value> = (0..65).map(|n| vm(json!({ "name": format!("vm{n}") }))).collect();
    let disks = |count| std::vec![json!({ "file": "disk" }); count];
    let rom = |at: i64| one(json!({ "roms": [{ "file": "page", "at": at }] }));
    let beside = |what: Value, at: i64| {
        let mut vm = json!({ "roms": [{ "file": "page", "at": at }] });
        for (key, value) in what.as_object().expect("an object") {
            vm[key] = value.clone();
        }
        one(vm)
    };
    let firmware = || json!({ "kernel": "firmware", "kernel_format": "firmware" });
    #[rustfmt::skip]
    let table: &[(Value, &str)] = &[
        (json!({}), "vms = []: must list at least one virtual machine"),
        (json!({ "vms": many }), "vms = 65 entries: must be at most 64"),
        (json!({ "outer": { "memory": "4" }, "vms": [vm(json!({}))] }), "outer.memory = \"4\": must be a whole number followed by K, M, G or T (powers of 1024), like \"512M\""),
        (json!({ "outer": { "memory": "128M" }, "vms": [vm(json!({}))] }), "outer.memory = 128M: must be at least 256M"),
        (json!({ "outer": { "memory": "256G" }, "vms": [vm(json!({}))] }), "outer.memory = 256G: must be at most 255G"),
        (json!({ "outer": { "memory": "513M" }, "vms": [vm(json!({}))] }), "outer.memory = 513M: must be a multiple of 2M"),
        (json!({ "outer": { "cpus": 0 }, "vms": [vm(json!({}))] }), "outer.cpus = 0: must be from 1 to 64"),
        (json!({ "outer": { "cpus": 65 }, "vms": [vm(json!({}))] }), "outer.cpus = 65: must be from 1 to 64"),
        (json!({ "outer": { "cpus": 3, "housekeeping_cpus": 3 }, "vms": [vm(json!({}))] }), "outer.housekeeping_cpus = 3: must be from 0 to 2"),
        (json!({ "outer": { "housekeeping_cpus": -1 }, "vms": [vm(json!({}))] }), "outer.housekeeping_cpus = -1: must be from 0 to 1"),
        (one(json!({ "name": "" })), "vms[0].name = \"\": must be 1 to 32 of the characters a-z, 0-9 and '-', and not start with '-'"),
        (one(json!({ "name": "Web" })), "vms[0].name = \"Web\": must be 1 to 32 of the characters a-z, 0-9 and '-', and not start with '-'"),
        (one(json!({ "name": "-a" })), "vms[0].name = \"-a\": must be 1 to 32 of the characters a-z, 0-9 and '-', and not start with '-'"),
        (one(json!({ "name": "a".repeat(33) })), "vms[0].name = \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\": must be 1 to 32 of the characters a-z, 0-9 and '-', and not start with '-'"),
        (one(json!({ "memory": "512" })), "vms[0].memory = \"512\": must be a whole number followed by K, M, G or T (powers of 1024), like \"512M\""),
        (one(json!({ "coalesced_mmio": [{ "base": 0x0c00_0000, "size": 12 }] })), "vms[0].coalesced_mmio[0].size = 12: must be a multiple of 8 above zero"),
        (one(json!({ "coalesced_mmio": [{ "base": 0x0bff_fff8, "size": 8 }] })), "vms[0].coalesced_mmio[0].base = 0xbfffff8: must be a multiple of 8, and the zone must lie within 0xc000000-0xdffffff"),
        (one(json!({ "coalesced_mmio": [{ "base": u64::MAX - 7, "size": 8 }] })), "vms[0].coalesced_mmio[0].base = 0xfffffffffffffff8: must be a multiple of 8, and the zone must lie within 0xc000000-0xdffffff"),
        (one(json!({ "coalesced_mmio": [{ "base": 0x0c00_0000, "size": 16 }, { "base": 0x0c00_0008, "size": 8 }] })), "vms[0].coalesced_mmio[1].base = 0xc000008: must not overlap vms[0].coalesced_mmio[0]"),
        (one(json!({ "coalesced_mmio": std::vec![json!({ "base": 0x0c00_0000, "size": 8 }); 5] })), "vms[0].coalesced_mmio = 5 entries: must be at most 4"),
        (one(json!({ "doorbells": std::vec![json!({ "address": 0x0c00_0000, "size": 4 }); 9] })), "vms[0].doorbells = 9 entries: must be at most 8"),
        (one(json!({ "pass_through": [{ "machine": 0x0a00_0000, "base": 0x0c10_0000, "size": 512 }] })), "vms[0].pass_through[0].size = 512: must be a multiple of 4096 above zero"),
        (one(json!({ "pass_through": [{ "machine": 0x0a00_0200, "base": 0x0c10_0000, "size": 4096 }] })), "vms[0].pass_through[0].machine = 0xa000200: must be a multiple of 4096, and not wrap with its size"),
        (one(json!({ "pass_through": [{ "machine": 0xffff_ffff_ffff_f000_u64, "base": 0x0c10_0000, "size": 4096 }] })), "vms[0].pass_through[0].machine = 0xfffffffffffff000: must be a multiple of 4096, and not wrap with its size"),
        (one(json!({ "pass_through": [{ "machine": 0x0a00_0000, "base": 0x0900_0000, "size": 4096 }] })), "vms[0].pass_through[0].base = 0x9000000: must be a multiple of 4096, and the device must lie within 0xc000000-0xdffffff"),
        (one(json!({ "doorbells": [{ "address": 0x0c10_0ff8, "size": 8 }], "pass_through": [{ "machine": 0x0a00_0000, "base": 0x0c10_0000, "size": 4096 }] })), "vms[0].pass_through[0].base = 0xc100000: must share no page with a coalesced zone, a doorbell or another device"),
        (one(json!({ "pass_through": [{ "machine": 0x0a00_0000, "base": 0x0c10_0000, "size": 4096 }, { "machine": 0x0a00_1000, "base": 0x0c10_0000, "size": 4096 }] })), "vms[0].pass_through[1].base = 0xc100000: must share no page with a coalesced zone, a doorbell or another device"),
        (one(json!({ "pass_through": std::vec![json!({ "machine": 0x0a00_0000, "base": 0x0c10_0000, "size": 4096 }); 5] })), "vms[0].pass_through = 5 entries: must be at most 4"),
        (json!({ "vms": [vm(json!({ "pass_through": [{ "machine": 0x0a00_0000, "base": 0x0c10_0000, "size": 8192 }] })), vm(json!({ "name": "b", "pass_through": [{ "machine": 0x0a00_1000, "base": 0x0c10_0000, "size": 4096 }] }))] }), "vms[1].pass_through[0].machine = 0xa001000: must be given once, and vms[0] has some of it"),
        (one(json!({ "doorbells": [{ "address": 0x0c00_0000, "size": 3 }] })), "vms[0].doorbells[0].size = 3: must be 1, 2, 4 or 8"),
        (one(json!({ "doorbells": [{ "address": 0x0c00_0002, "size": 4 }] })), "vms[0].doorbells[0].address = 0xc000002: must be a multiple of its size, and the doorbell must lie within 0xc000000-0xdffffff"),
        (one(json!({ "doorbells": [{ "address": 0x0e00_0000, "size": 4 }] })), "vms[0].doorbells[0].address = 0xe000000: must be a multiple of its size, and the doorbell must lie within 0xc000000-0xdffffff"),
        (one(json!({ "coalesced_mmio": [{ "base": 0x0c00_0000, "size": 16 }], "doorbells": [{ "address": 0x0c00_0008, "size": 4 }] })), "vms[0].doorbells[0].address = 0xc000008: must not lie in vms[0].coalesced_mmio[0]"),
        (one(json!({ "doorbells": std::vec![json!({ "address": 0x0c00_0000, "size": 4 }); 2] })), "vms[0].doorbells[1].address = 0xc000000: must not be that of vms[0].doorbells[0]"),
        (one(json!({ "memory": "513M" })), "vms[0].memory = 513M: must be a multiple of 2M"),
        (one(json!({ "memory": "1K" })), "vms[0].memory = 1K: must be a multiple of 2M"),
        (one(json!({ "memory": { "size": "64M", "private": true }, "mte": true })), "vms[0].memory.private = true: must be false where vms[0].mte = true"),
        (one(json!({ "memory": { "size": "64M", "private": true }, "merge": true })), "vms[0].memory.private = true: must be false where vms[0].merge = true"),
        (one(json!({ "memory": { "size": "64M", "private": true, "max": "32M" } })), "vms[0].memory.max = 32M: must be absent where vms[0].memory.private = true: private memory stays"),
        (one(json!({ "memory": { "size": "64M", "max": "65M" } })), "vms[0].memory.max = 65M: must be between 2M and the VM's size, 64M"),
        (one(json!({ "memory": { "size": "64M", "max": "1M" } })), "vms[0].memory.max = 1M: must be between 2M and the VM's size, 64M"),
        (one(json!({ "memory": { "size": "64M", "max": "2049K" } })), "vms[0].memory.max = 2049K: must be a multiple of 4K"),
        (one(json!({ "memory": { "size": "64M", "max": "lots" } })), "vms[0].memory.max = \"lots\": must be a whole number followed by K, M, G or T (powers of 1024), like \"512M\""),
        (one(json!({ "memory": { "size": "64M", "low": "1K" } })), "vms[0].memory.low = 1K: must be a multiple of 4K"),
        (one(json!({ "memory": { "size": "64M", "low": "66M" } })), "vms[0].memory.low = 66M: must be at most what the VM may have, 64M"),
        (one(json!({ "memory": { "size": "64M", "max": "32M", "low": "33M" } })), "vms[0].memory.low = 33M: must be at most what the VM may have, 32M"),
        (one(json!({ "memory": { "size": "64M", "priority": 256 } })), "vms[0].memory.priority = 256: must be between 0 and 255"),
        (one(json!({ "memory": { "size": "64M", "priority": -1 } })), "vms[0].memory.priority = -1: must be between 0 and 255"),
        (one(json!({ "memory": { "size": "128M", "io": "bounce" } })), "vms[0].memory.io = \"bounce\": needs memory.private = true"),
        (one(json!({ "memory": { "size": "126M", "private": true, "io": "bounce" } })), "vms[0].memory = 126M: must be at least 128M where memory.io = \"bounce\""),
        (one(json!({ "memory": "0M" })), "vms[0].memory = 0 bytes: must be above zero"),
        (json!({ "outer": { "merge_pages_per_second": -1 }, "vms": [vm(json!({}))] }), "outer.merge_pages_per_second = -1: must be from 0 to 1048576"),
        (json!({ "outer": { "merge_pages_per_second": 1048577 }, "vms": [vm(json!({}))] }), "outer.merge_pages_per_second = 1048577: must be from 0 to 1048576"),
        (one(json!({ "memory": "5G" })), "vms[0].memory = 5G: must be at most the machine's: outer.memory = 4G"),
        (one(json!({ "vcpus": 0 })), "vms[0].vcpus = 0: must be from 1 to 8"),
        (one(json!({ "vcpus": 9 })), "vms[0].vcpus = 9: must be from 1 to 8"),
        (one(json!({ "vcpus": -1 })), "vms[0].vcpus = -1: must be from 1 to 8"),
        (one(json!({ "vcpus": i64::MAX })), "vms[0].vcpus = 9223372036854775807: must be from 1 to 8"),
        (one(json!({ "kernel": "gone" })), "vms[0].kernel = \"gone\": must be a file that can be read: no such file"),
        (one(json!({ "kernel": "empty" })), "vms[0].kernel = \"empty\": must not be empty"),
        (one(json!({ "memory": "2M" })), "vms[0].kernel = \"Image\": must fit into the VM's memory: it has 31457280 bytes, vms[0].memory is 2M"),
        (one(json!({ "memory": "32M", "initrd": "initrd" })), "vms[0].initrd = \"initrd\": must fit into the VM's memory beside the kernel: they have 10485760 and 31457280 bytes, vms[0].memory is 32M"),
        (one(json!({ "initrd": "gone" })), "vms[0].initrd = \"gone\": must be a file that can be read: no such file"),
        (one(json!({ "cmdline": "x".repeat(2048) })), "vms[0].cmdline = 2048 bytes: must be at most 2047 bytes"),
        (one(json!({ "cmdline": "a\0b" })), "vms[0].cmdline = \"a\\0b\": must not contain a zero byte, which would end it"),
        (one(json!({ "disks": disks(9) })), "vms[0].disks = 9 entries: must be at most 8"),
        (one(json!({ "disks": [{ "file": "disk" }, { "file": "gone" }] })), "vms[0].disks[1].file = \"gone\": must be a file that can be read: no such file"),
        (one(json!({ "disks": [{ "file": "odd" }] })), "vms[0].disks[0].file = \"odd\": must be whole sectors of 512 bytes: it has 513 bytes"),
        (rom(-1), "vms[0].roms[0].at = -1: must not be negative"),
        (rom(0x800), "vms[0].roms[0].at = 0x800: must be a multiple of 4K"),
        (rom(0x0800_0000), "vms[0].roms[0].at = 0x8000000: must be such that 100 bytes end by 0x8000000, where devices begin"),
        (rom(i64::MAX & !0xfff), "vms[0].roms[0].at = 0x7ffffffffffff000: must be such that 100 bytes end by 0x8000000, where devices begin"),
        (one(json!({ "roms": [{ "file": "gone", "at": 0 }] })), "vms[0].roms[0].file = \"gone\": must be a file that can be read: no such file"),
        (one(json!({ "roms": std::vec![json!({ "file": "page", "at": 0 }); 9] })), "vms[0].roms = 9 entries: must be at most 8"),
        (one(json!({ "roms": [{ "file": "page", "at": 0x1000 }, { "file": "firmware", "at": 0 }] })), "vms[0].roms[1].at = 0x0: must leave 0x1000..0x2000 to vms[0].roms[0].at: with 2097152 bytes it ends at 0x200000"),
        (beside(firmware(), 0x1f_f000), "vms[0].roms[0].at = 0x1ff000: must leave 0x0..0x200000 to vms[0].kernel: with 100 bytes it ends at 0x200000"),
        (beside(json!({ "flash": "vars" }), 0x040f_f000), "vms[0].roms[0].at = 0x40ff000: must leave 0x4000000..0x4100000 to vms[0].flash: with 100 bytes it ends at 0x4100000"),
        (one(json!({ "flash": "gone" })), "vms[0].flash = \"gone\": must be a file that can be read: no such file"),
        (one(json!({ "flash": "odd" })), "vms[0].flash = \"odd\": must have a power of two of bytes, from 256K to 64M: it has 513"),
        (one(json!({ "flash": "huge" })), "vms[0].flash = \"huge\": must have a power of two of bytes, from 256K to 64M: it has 67371008"),
        (one(json!({ "kernel": "huge", "kernel_format": "firmware" })), "vms[0].kernel = \"huge\": must have at most 64M as firmware: it has 67371008 bytes"),
        (one(json!({ "kernel": "firmware", "kernel_format": "firmware", "initrd": "initrd" })), "vms[0].initrd = \"initrd\": must be absent beside firmware, which would not look for it"),
        (json!({ "vms": [vm(json!({})), vm(json!({}))] }), "vms[1].name = \"a\": must differ from every other VM's name, and vms[0] has it"),
        (json!({ "vms": [vm(json!({ "policies": { "console": "foreground" } })), vm(json!({ "name": "b", "policies": { "console": "foreground" } }))] }), "vms[1].policies.console = \"foreground\": one VM at most has the foreground, and vms[0] has it"),
    ];
    for (written, message) in table {
        assert_eq!(check(written.clone()).map_err(|refusal| refusal.to_string()), Err(message.to_string()));
    }
}

#[test]
fn policies_are_taken_over_and_absent_ones_are_safe() {
    let policies = |value| check(one(json!({ "policies": value }))).expect("right").vms[0].policies;
    let all = |policies: Policies| {
        let Policies { no_syndrome, read_only_ivac, cache_maintenance, read_only_store, shared_block, .. } = policies;
        (no_syndrome, read_only_ivac, cache_maintenance, read_only_store, shared_block)
    };
    let written = policies(json!({
        "no_syndrome": "stop", "read_only_ivac": "clean", "cache_maintenance": "trap", "read_only_store": "abort",
        "shared_block": "whole",
    }));
    let expected =
        (NoSyndrome::Stop, ReadOnlyIvac::Clean, CacheMaintenance::Trap, ReadOnlyStore::Abort, SharedBlock::Whole);
    assert_eq!(all(written), expected);
    let expected =
        (NoSyndrome::Inject, ReadOnlyIvac::Abort, CacheMaintenance::Direct, ReadOnlyStore::Ignore, SharedBlock::Split);
    assert_eq!(all(policies(json!({}))), expected);
}

#[test]
fn unknown_keys_are_refused_by_name() {
    let table = [
        json!({ "vm": [] }),
        one(json!({ "memroy": "1G" })),
        one(json!({ "policies": { "reset": "stop" } })),
        one(json!({ "disks": [{ "file": "disk", "readonly": true }] })),
        one(json!({ "roms": [{ "file": "page", "at": 0, "size": 1 }] })),
        json!({ "outer": { "ram": "1G" } }),
    ];
    for (written, key) in table.into_iter().zip(["vm", "memroy", "reset", "readonly", "size", "ram"]) {
        let error = serde_json::from_value::<Written>(written).expect_err(key).to_string();
        assert!(error.starts_with(&format!("unknown field `{key}`")), "{error}");
    }
}

#[test]
fn limits_themselves_are_allowed() {
    let disks = std::vec![json!({ "file": "disk", "read_only": true }); MAX_DISKS];
    let most =
        json!({ "name": "a".repeat(32), "memory": "4G", "vcpus": 8, "disks": disks, "cmdline": "x".repeat(2047) });
    assert!(check(one(most)).is_ok());
    let roms: std::vec::Vec<Value> =
        (0..8).map(|n| json!({ "file": "page", "at": 0x07ff_8000 + n * 0x1000 })).collect();
    let full = json!({ "kernel": "bank", "kernel_format": "firmware", "memory": "2M", "flash": "vars", "roms": roms });
    assert!(check(one(full)).is_ok());
    assert!(check(one(json!({ "flash": "bank" }))).is_ok());
    let machines: std::vec::Vec<Value> = (0..64).map(|n| vm(json!({ "name": format!("{n}") }))).collect();
    assert!(check(json!({ "outer": { "memory": "255G", "cpus": 64 }, "vms": machines })).is_ok());
}

#[test]
fn foreground_goes_to_who_asks_else_to_the_first_that_is_silent() {
    let consoles = |said: &[Value]| {
        let vms = said.iter().enumerate().map(|(n, console)| {
            let policies = if console.is_null() { json!({}) } else { json!({ "console": console }) };
            vm(json!({ "name": format!("vm{n}"), "policies": policies }))
        });
        let config = check(json!({ "vms": vms.collect::<std::vec::Vec<_>>() })).expect("right");
        config.vms.iter().position(|vm| vm.policies.console == Console::Foreground)
    };
    assert_eq!(consoles(&[Value::Null, Value::Null]), Some(0));
    assert_eq!(consoles(&[Value::Null, json!("foreground")]), Some(1));
    assert_eq!(consoles(&[json!("background"), Value::Null]), Some(1));
    assert_eq!(consoles(&[json!("background"), json!("background")]), None);
}

#[test]
fn kernel_format_follows_the_name_unless_said() {
    let format = |change| check(one(change)).expect("right").vms[0].kernel_format;
    assert_eq!(format(json!({ "kernel": "Image" })), KernelFormat::Auto);
    assert_eq!(format(json!({ "kernel": "u-boot.bin" })), KernelFormat::Flat);
    assert_eq!(format(json!({ "kernel": "u-boot.bin", "kernel_format": "auto" })), KernelFormat::Auto);
    assert_eq!(format(json!({ "kernel": "Image", "kernel_format": "flat" })), KernelFormat::Flat);
}

#[test]
fn files_are_asked_for_in_order_with_their_roles() {
    let config = check(one(json!({
        "initrd": "initrd",
        "disks": [{ "file": "disk" }, { "file": "disk", "read_only": true }],
        "roms": [{ "file": "page", "at": 0x1000 }],
        "flash": "vars",
    })));
    let mut asked = std::vec::Vec::new();
    let mapped = config.expect("right").map_files(|role, path| {
        asked.push((role, path));
        Ok::<_, ()>(asked.len())
    });
    let vm = &mapped.expect("no name fails").vms[0];
    assert_eq!((vm.kernel, vm.initrd), (1, Some(2)));
    assert_eq!(vm.disks, [Disk { file: 3, read_only: false }, Disk { file: 4, read_only: true }]);
    assert_eq!((&vm.roms[..], vm.flash), (&[Rom { file: 5, at: 0x1000 }][..], Some(6)));
    let roles: std::vec::Vec<Role> = asked.iter().map(|(role, _)| *role).collect();
    let expected = [
        Role::Kernel { vm: 0 },
        Role::Initrd { vm: 0 },
        Role::Disk { vm: 0, disk: 0, writable: true },
        Role::Disk { vm: 0, disk: 1, writable: false },
        Role::Rom { vm: 0, rom: 0 },
        Role::Flash { vm: 0 },
    ];
    assert_eq!(roles, expected);
}

/// One configuration serves both architectures; what only arm64 has is refused by name, and is right there.
#[test]
fn what_x86_has_not_is_refused_by_name() {
    let on = |arch: &str, change: Value| check(json!({ "outer": { "arch": arch }, "vms": [vm(change)] }));
    let both = json!({ "initrd": "initrd", "disks": [{ "file": "disk" }], "balloon": true, "merge": true });
    assert_eq!(on("x86_64", both).expect("right on both").outer.arch, Arch::X86);
    let private = json!({ "memory": { "size": "512M", "private": true }, "policies": { "no_syndrome": "stop" } });
    assert!(on("x86_64", private).is_ok());
    #[rustfmt::skip]
    let table = [
        (json!({ "mte": true }), "vms[0].mte = true: must be false"),
        (json!({ "kernel": "u-boot.bin" }), "vms[0].kernel_format = \"flat\": must be \"auto\""),
        (json!({ "kernel": "firmware", "kernel_format": "firmware" }), "vms[0].kernel_format = \"firmware\": must be \"auto\""),
        (json!({ "memory": { "size": "512M", "private": true, "io": "bounce" } }), "vms[0].memory.io = \"bounce\": must be \"lease\""),
        (json!({ "roms": [{ "file": "page", "at": 0x1000 }] }), "vms[0].roms = 1 entries: must be empty"),
        (json!({ "coalesced_mmio": [{ "base": 0x0c00_0000, "size": 8 }] }), "vms[0].coalesced_mmio = 1 entries: must be empty"),
        (json!({ "doorbells": [{ "address": 0x0c00_0000, "size": 4 }] }), "vms[0].doorbells = 1 entries: must be empty"),
        (json!({ "pass_through": [{ "machine": 0x0a00_0000, "base": 0x0c10_0000, "size": 4096 }] }), "vms[0].pass_through = 1 entries: must be empty"),
        (json!({ "flash": "vars" }), "vms[0].flash = \"vars\": must be absent"),
        (json!({ "policies": { "cache_maintenance": "trap" } }), "vms[0].policies.cache_maintenance = \"trap\": must be \"direct\""),
        (json!({ "policies": { "read_only_ivac": "clean" } }), "vms[0].policies.read_only_ivac = \"clean\": must be \"abort\""),
        (json!({ "policies": { "read_only_store": "abort" } }), "vms[0].policies.read_only_store = \"abort\": must be \"ignore\""),
    ];
    for (change, what) in table {
        assert!(on("arm64", change.clone()).is_ok(), "{what}");
        let text = on("x86_64", change).expect_err(what).to_string();
        assert!(text.starts_with(what) && text.contains(" where outer.arch = \"x86_64\": "), "{text}");
    }
    assert!(serde_json::from_value::<Written>(json!({ "outer": { "arch": "riscv" } })).is_err());
}

#[test]
fn shadow_paging_is_for_what_can_run_on_it() {
    let on = |arch: &str, change: Value| {
        let mut shadow = json!({ "policies": { "paging": "shadow" } });
        shadow.as_object_mut().expect("it is one").extend(change.as_object().expect("it is one").clone());
        check(json!({ "outer": { "arch": arch }, "vms": [vm(shadow)] }))
    };
    assert_eq!(on("x86_64", json!({})).expect("right").vms[0].policies.paging, Paging::Shadow);
    let private = json!({ "memory": { "size": "512M", "private": true } });
    for (arch, change, what) in [
        ("arm64", json!({}), "vms[0].policies.paging = \"shadow\": must be \"nested\""),
        ("x86_64", private, "vms[0].memory.private = true: must be false where policies.paging = \"shadow\""),
    ] {
        let text = on(arch, change).expect_err(what).to_string();
        assert!(text.starts_with(what), "{text}");
    }
}

proptest! {
    /// The hypervisor's second check refuses whatever a changed number makes wrong, and never panics.
    #[test]
    fn check_of_any_numbers_never_panics(memory: u64, vcpus: u32, outer: u64, cpus: u32, kernel: u64, initrd: u64, name in ".{0,40}") {
        let mut config = check(one(json!({ "initrd": "initrd" }))).expect("right");
        config.outer = Outer { memory: outer, cpus, ..Outer::default() };
        let vm = &mut config.vms[0];
        (vm.memory, vm.vcpus, vm.name) = (memory, vcpus, name);
        let mut length = |path: &String| Ok(if path == "Image" { kernel } else { initrd });
        if config.check(&mut length).is_ok() {
            prop_assert!(memory % MEMORY_GRANULE == 0 && memory <= outer && (1..=8).contains(&vcpus));
            prop_assert!(kernel > 0 && initrd > 0 && kernel.checked_add(initrd).is_some_and(|both| both <= memory));
        }
    }

    #[test]
    fn json_of_a_config_reads_back(vcpus in 1..=8u32, granules in 20..2000u64, cmdline in "[^\0]{0,50}", flags: [bool; 9]) {
        let change = json!({ "disks": [{ "file": "disk" }], "roms": [{ "file": "page", "at": 0 }], "flash": "vars" });
        let mut config = check(one(change)).expect("right");
        let vm = &mut config.vms[0];
        (vm.vcpus, vm.memory, vm.cmdline, vm.autostart) = (vcpus, granules * MEMORY_GRANULE, cmdline, flags[0]);
        vm.policies.page_size = if flags[1] { LargestEntry::Page4K } else { LargestEntry::Block2M };
        vm.policies.unclaimed_mmio = if flags[2] { UnclaimedMmio::ReadAsZero } else { UnclaimedMmio::Abort };
        vm.policies.on_guest_reset = if flags[3] { OnReset::Stop } else { OnReset::Reboot };
        vm.policies.no_syndrome = if flags[4] { NoSyndrome::Stop } else { NoSyndrome::Inject };
        vm.policies.read_only_ivac = if flags[5] { ReadOnlyIvac::Clean } else { ReadOnlyIvac::Abort };
        vm.policies.cache_maintenance = if flags[6] { CacheMaintenance::Trap } else { CacheMaintenance::Direct };
        vm.policies.read_only_store = if flags[7] { ReadOnlyStore::Abort } else { ReadOnlyStore::Ignore };
        vm.policies.shared_block = if flags[8] { SharedBlock::Whole } else { SharedBlock::Split };
        let json = serde_json::to_string(&config).expect("strings for keys");
        prop_assert_eq!(serde_json::from_str::<Config<String>>(&json).expect("what was written"), config);
    }
}
