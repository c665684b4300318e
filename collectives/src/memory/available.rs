//! How much memory there still is.

/// Bytes that this process may still use, and who sets that limit: the host, or its control group (version 2).
pub fn available_memory() -> (u64, &'static str) {
    let host = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
        })
        .unwrap_or(u64::MAX);
    let group = std::fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|text| {
            let path = std::path::PathBuf::from(text.lines().find_map(|line| line.strip_prefix("0::"))?);
            // Every group above sets a limit, too.
            path.ancestors().filter_map(|group| left_in_group(group.to_str()?.trim_end_matches('/'))).min()
        })
        .unwrap_or(u64::MAX);
    if group < host { (group, "this control group's memory limit") } else { (host, "this host's available memory") }
}

/// Bytes that a control group may still use, if it has a limit.
fn left_in_group(path: &str) -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup{path}/{file}")).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?;
    // Pages that the kernel gives up before it refuses anybody.
    let statistics = read("memory.stat")?;
    let reclaimable = ["inactive_file ", "active_file ", "slab_reclaimable "].into_iter();
    let reclaimable = reclaimable
        .filter_map(|name| statistics.lines().find_map(|line| line.strip_prefix(name))?.parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(number("memory.current")?.saturating_sub(reclaimable)))
}
