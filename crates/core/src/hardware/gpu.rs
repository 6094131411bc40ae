//! NVIDIA GPUs through NVML, which is loaded at run time: a machine without the driver needs nothing.

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::Gpu;

/// The GPUs that NVML shows, and why there may be more than those.
pub(super) fn probe() -> (Vec<Gpu>, Option<String>) {
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        Err(e) => return (Vec::new(), Some(why_not(&e))),
    };
    let count = match nvml.device_count() {
        Ok(count) => count,
        Err(e) => return (Vec::new(), Some(format!("NVML can't count the GPUs: {}", why_not(&e)))),
    };
    let driver = nvml.sys_driver_version().ok();
    let mut gpus = Vec::new();
    let mut hidden = Vec::new();
    for index in 0..count {
        match nvml.device_by_index(index) {
            Ok(device) => gpus.push(describe(index, &device, driver.clone())),
            Err(e) => hidden.push(format!("GPU {index}: {}", why_not(&e))),
        }
    }
    (gpus, (!hidden.is_empty()).then(|| hidden.join("; ")))
}

/// Why NVML could not be used, and the way out.
pub(crate) fn why_not(error: &NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(_) if cfg!(target_os = "macos") => {
            "NVML does not exist on macOS, and GPUs without it are not listed".into()
        }
        NvmlError::LibloadingError(e) => format!(
            "the NVIDIA driver's NVML library is not there ({e}); if the machine has an NVIDIA GPU, install the \
             driver, and in a container ask for its `utility` capability"
        ),
        NvmlError::DriverNotLoaded => {
            "NVML is there, but the NVIDIA kernel driver is not loaded (`modprobe nvidia`)".into()
        }
        NvmlError::LibRmVersionMismatch => {
            "the NVIDIA kernel driver and its libraries have different versions; restart the machine".into()
        }
        NvmlError::NoPermission => "NVML may not be used by this user (see the rights of /dev/nvidiactl)".into(),
        NvmlError::GpuLost => {
            "the GPU has fallen off the bus or stopped answering: `nvidia-smi -r` or a restart may bring it back, and \
             the kernel's log (`dmesg | grep -i xid`) tells why"
                .into()
        }
        NvmlError::FailedToLoadSymbol(e) => {
            format!("the NVIDIA driver is too old for this use of NVML ({e}); update it")
        }
        NvmlError::InsufficientPower => "the GPU's extra power cables are not connected".into(),
        e => format!("NVML gives nothing: {e}"),
    }
}

/// Everything the driver is willing to tell; a refused query leaves its field absent.
fn describe(index: u32, device: &Device, driver: Option<String>) -> Gpu {
    let milliwatts = device.enforced_power_limit().or_else(|_| device.power_management_limit());
    Gpu {
        index,
        name: device.name().unwrap_or_else(|_| "NVIDIA GPU of unknown name".into()),
        memory_bytes: device.memory_info().ok().map(|memory| memory.total),
        compute_capability: device.cuda_compute_capability().ok().map(|c| format!("{}.{}", c.major, c.minor)),
        driver,
        power_limit_watts: milliwatts.ok().map(|mw| f64::from(mw) / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_has_a_reason() {
        let (gpus, note) = probe();
        let counted = Nvml::init().and_then(|nvml| nvml.device_count());
        match counted {
            Ok(count) => assert_eq!(gpus.len() == count as usize, note.is_none()),
            Err(_) => assert!(gpus.is_empty() && note.is_some_and(|n| n.contains("NVML"))),
        }
    }

    #[test]
    fn reasons_name_the_way_out() {
        assert!(why_not(&NvmlError::DriverNotLoaded).contains("modprobe"));
        assert!(why_not(&NvmlError::LibRmVersionMismatch).contains("restart"));
        assert!(why_not(&NvmlError::NoPermission).contains("/dev/nvidiactl"));
        assert!(why_not(&NvmlError::GpuLost).contains("dmesg"));
        assert!(why_not(&NvmlError::Unknown).contains("NVML"));
    }
}
