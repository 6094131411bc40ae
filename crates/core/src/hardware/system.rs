//! The operating system, and what stands between it and the hardware: hypervisor, container, emulator.

use std::fs;
use std::path::Path;

use super::Os;

/// The operating system below `root`, which is `/` outside tests.
pub(super) fn probe(root: &Path) -> Os {
    let release = read(root, "etc/os-release").or_else(|| read(root, "usr/lib/os-release"));
    let name = release.as_deref().and_then(parse_os_release);
    let kernel = read(root, "proc/sys/kernel/osrelease").map(|text| text.trim().to_owned());
    Os {
        name: name
            .or_else(|| sysinfo::System::long_os_version().ok())
            .unwrap_or_else(|| std::env::consts::OS.to_owned()),
        kernel: kernel.filter(|k| !k.is_empty()).or_else(|| sysinfo::System::kernel_version().ok()),
    }
}

/// Load average over the last minute.
pub(super) fn load_1m(root: &Path) -> Option<f64> {
    match read(root, "proc/loadavg") {
        Some(text) => text.split_whitespace().next()?.parse().ok(),
        None => sysinfo::System::load_average().ok().map(|load| load.one),
    }
}

/// Emulator, Wine, hypervisor with the product that it shows, and container, joined; absent on bare metal.
pub(super) fn virtualization(root: &Path) -> Option<String> {
    let emulator = user_mode_emulator(root, std::env::consts::ARCH);
    let layers = [emulator, wine(), hypervisor(root, cpuid_hypervisor()), container(root)];
    let layers: Vec<String> = layers.into_iter().flatten().collect();
    (!layers.is_empty()).then(|| layers.join(", "))
}

/// What translates the instructions of this program, or of the whole machine, for another CPU.
pub(super) fn emulator(root: &Path) -> Option<String> {
    user_mode_emulator(root, std::env::consts::ARCH).or_else(|| cpuid_hypervisor().filter(|name| name == TCG))
}

/// Wine runs a program's instructions as they are, and stands in for Windows: its own programs lie among the system's.
fn wine() -> Option<String> {
    let system = std::env::var_os("SystemRoot").filter(|_| cfg!(windows))?;
    Path::new(&system).join("system32/winecfg.exe").exists().then(|| "Wine".to_owned())
}

/// `PRETTY_NAME` of os-release(5).
fn parse_os_release(text: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    let value = value.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

/// Programs built for another architecture run here under an emulator, which shows the host's `/proc/cpuinfo`.
fn user_mode_emulator(root: &Path, arch: &str) -> Option<String> {
    let family = |arch: &str| match arch {
        "x86" | "x86_64" => "x86",
        "arm" | "aarch64" => "arm",
        _ => "other",
    };
    let info = read(root, "proc/cpuinfo").unwrap_or_default();
    let has = |key: &str| info.lines().any(|line| line.split(':').next().is_some_and(|k| k.trim() == key));
    let host = if has("CPU implementer") {
        Some("arm")
    } else if has("vendor_id") && has("flags") {
        Some("x86")
    } else {
        None
    };
    // Newer qemu makes up a /proc/cpuinfo of the guest, yet the process keeps the emulator's name.
    let comm = read(root, "proc/self/comm").filter(|comm| comm.starts_with("qemu-"));
    match host.filter(|&host| host != family(arch)) {
        Some(host) => Some(format!("user-mode emulation of {arch} on an {host} host")),
        None => comm.map(|comm| format!("user-mode emulation ({})", comm.trim())),
    }
}

/// The hypervisor by CPUID, device tree or the product name in the firmware's tables.
fn hypervisor(root: &Path, cpuid: Option<String>) -> Option<String> {
    let dmi = |name: &str| read(root, &format!("sys/class/dmi/id/{name}")).map(|text| text.trim().to_owned());
    let product = [dmi("sys_vendor"), dmi("product_name")].into_iter().flatten().filter(|s| !s.is_empty());
    let product = product.collect::<Vec<_>>().join(" ");
    let flagged = || {
        let info = read(root, "proc/cpuinfo")?;
        let flags = info.lines().find(|line| line.starts_with("flags"))?;
        flags.split_whitespace().any(|flag| flag == "hypervisor").then(|| "unknown hypervisor".to_owned())
    };
    let device_tree = || {
        let compatible = read(root, "proc/device-tree/hypervisor/compatible")?;
        Some(compatible.trim_matches(['\0', '\n']).replace("linux,", "").to_uppercase())
    };
    let by_product = || {
        let metal = product.contains(".metal");
        let makers = [
            ("QEMU", "QEMU"),
            ("KVM", "KVM"),
            ("Amazon EC2", "Nitro"),
            ("Google Compute Engine", "KVM"),
            ("Virtual Machine", "Hyper-V"),
            ("VMware", "VMware"),
            ("VirtualBox", "VirtualBox"),
            ("Parallels", "Parallels"),
            ("Apple Virtualization", "Apple Virtualization"),
            ("Xen", "Xen"),
        ];
        let maker = makers.into_iter().find(|(mark, _)| product.contains(mark) && !metal)?;
        Some(maker.1.to_owned())
    };
    let name = cpuid.or_else(device_tree).or_else(by_product).or_else(flagged)?;
    Some(if product.is_empty() { name } else { format!("{name} ({product})") })
}

/// The signature that hypervisors leave at CPUID leaf 0x4000_0000, if the CPU says that there is one.
#[cfg(target_arch = "x86_64")]
fn cpuid_hypervisor() -> Option<String> {
    use std::arch::x86_64::__cpuid;
    const PRESENT: u32 = 1 << 31;
    if __cpuid(1).ecx & PRESENT == 0 {
        return None;
    }
    let leaf = __cpuid(0x4000_0000);
    let bytes: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    Some(signature_name(String::from_utf8_lossy(&bytes).trim_matches(['\0', ' '])))
}

#[cfg(not(target_arch = "x86_64"))]
fn cpuid_hypervisor() -> Option<String> {
    None
}

/// QEMU without the help of the CPU.
const TCG: &str = "QEMU emulation (TCG)";

#[cfg(any(target_arch = "x86_64", test))]
fn signature_name(signature: &str) -> String {
    let name = match signature {
        "KVMKVMKVM" => "KVM",
        "Microsoft Hv" => "Hyper-V",
        "VMwareVMware" => "VMware",
        "XenVMMXenVMM" => "Xen",
        "TCGTCGTCGTCG" => TCG,
        "VBoxVBoxVBox" => "VirtualBox",
        "bhyve bhyve" => "bhyve",
        "lrpepyh vr" | "prl hyperv" => "Parallels",
        "ACRNACRNACRN" => "ACRN",
        "" => "unknown hypervisor",
        other => return format!("hypervisor `{}`", other.escape_default()),
    };
    name.to_owned()
}

/// The container, by the marks that its manager leaves.
fn container(root: &Path) -> Option<String> {
    if let Some(name) = read(root, "run/systemd/container").map(|text| text.trim().to_owned())
        && !name.is_empty()
    {
        return Some(format!("container ({name})"));
    }
    let kernel = read(root, "proc/sys/kernel/osrelease").unwrap_or_default().to_lowercase();
    if kernel.contains("microsoft") {
        return Some("WSL".into());
    }
    let groups = read(root, "proc/self/cgroup").unwrap_or_default();
    let marks = [
        ("kubepods", "kubernetes"),
        ("docker", "docker"),
        ("libpod", "podman"),
        ("lxc", "lxc"),
        ("containerd", "containerd"),
    ];
    let by_group = marks.into_iter().find(|(mark, _)| groups.contains(mark)).map(|(_, name)| name);
    let by_file = [("run/.containerenv", "podman"), (".dockerenv", "docker")];
    let by_file = || by_file.into_iter().find(|(file, _)| root.join(file).exists()).map(|(_, name)| name);
    by_group.or_else(by_file).map(|name| format!("container ({name})"))
}

fn read(root: &Path, name: &str) -> Option<String> {
    fs::read_to_string(root.join(name)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::test_tree::tree;

    const X86: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu hypervisor avx2\n";

    #[test]
    fn os_and_load() {
        let dir = tree(&[
            ("etc/os-release", "NAME=Debian\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"),
            ("proc/sys/kernel/osrelease", "6.1.0-30-amd64\n"),
            ("proc/loadavg", "0.96 1.24 0.69 1/86 16795\n"),
        ]);
        let os = Os { name: "Debian GNU/Linux 12 (bookworm)".into(), kernel: Some("6.1.0-30-amd64".into()) };
        assert_eq!(probe(dir.path()), os);
        assert_eq!(load_1m(dir.path()), Some(0.96));
        assert_eq!(load_1m(tree(&[("proc/loadavg", "much\n")]).path()), None);
        assert!(!probe(&dir.path().join("missing")).name.is_empty());
    }

    #[test]
    fn hypervisors() {
        let ec2 = [("sys/class/dmi/id/sys_vendor", "Amazon EC2\n"), ("sys/class/dmi/id/product_name", "c7g.large\n")];
        let kvm = Some("KVM".to_owned());
        assert_eq!(hypervisor(tree(&ec2).path(), kvm).as_deref(), Some("KVM (Amazon EC2 c7g.large)"));
        assert_eq!(hypervisor(tree(&ec2).path(), None).as_deref(), Some("Nitro (Amazon EC2 c7g.large)"));
        let metal = [("sys/class/dmi/id/sys_vendor", "Amazon EC2\n"), ("sys/class/dmi/id/product_name", "c7g.metal\n")];
        assert_eq!(hypervisor(tree(&metal).path(), None), None);
        assert_eq!(hypervisor(tree(&[("proc/cpuinfo", X86)]).path(), None).as_deref(), Some("unknown hypervisor"));
        let arm = [("proc/device-tree/hypervisor/compatible", "linux,kvm\0")];
        assert_eq!(hypervisor(tree(&arm).path(), None).as_deref(), Some("KVM"));
        let laptop = [("sys/class/dmi/id/sys_vendor", "LENOVO"), ("sys/class/dmi/id/product_name", "21CB")];
        assert_eq!(hypervisor(tree(&laptop).path(), None), None);
        assert_eq!(signature_name("KVMKVMKVM"), "KVM");
        assert_eq!(signature_name("New\u{1}One"), "hypervisor `New\\u{1}One`");
    }

    #[test]
    fn containers() {
        let name = |files: &[(&str, &str)]| container(tree(files).path());
        assert_eq!(
            name(&[("run/systemd/container", "systemd-nspawn\n")]).as_deref(),
            Some("container (systemd-nspawn)")
        );
        assert_eq!(name(&[(".dockerenv", "")]).as_deref(), Some("container (docker)"));
        assert_eq!(
            name(&[("proc/self/cgroup", "0::/kubepods/burstable/docker-1\n")]).as_deref(),
            Some("container (kubernetes)")
        );
        assert_eq!(name(&[("proc/sys/kernel/osrelease", "5.15.0-microsoft-standard-WSL2")]).as_deref(), Some("WSL"));
        assert_eq!(name(&[("proc/self/cgroup", "0::/user.slice\n")]), None);
    }

    #[test]
    fn user_mode_emulation() {
        let amd = tree(&[("proc/cpuinfo", X86), ("proc/self/comm", "bench\n")]);
        let found = user_mode_emulator(amd.path(), "aarch64");
        assert_eq!(found.as_deref(), Some("user-mode emulation of aarch64 on an x86 host"));
        assert_eq!(user_mode_emulator(amd.path(), "x86_64"), None);
        let arm = tree(&[("proc/cpuinfo", "CPU implementer\t: 0x41\n"), ("proc/self/comm", "qemu-aarch64\n")]);
        assert_eq!(user_mode_emulator(arm.path(), "aarch64").as_deref(), Some("user-mode emulation (qemu-aarch64)"));
        assert!(user_mode_emulator(arm.path(), "x86_64").is_some());
        assert_eq!(user_mode_emulator(tree(&[("proc/cpuinfo", "\u{0}garbage")]).path(), "x86_64"), None);
    }
}
