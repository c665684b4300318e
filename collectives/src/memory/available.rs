//! How much memory there still is.

use std::fs;
use std::path::Path;

/// Bytes that this process may still use, and who sets that limit: the host, or its control group.
pub fn available_memory() -> (u64, &'static str) {
    let host = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
        })
        .unwrap_or(u64::MAX);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = left_in_groups(&groups, Path::new("/sys/fs/cgroup")).unwrap_or(u64::MAX);
    if group < host { (group, "this control group's memory limit") } else { (host, "this host's available memory") }
}

/// What one version of control groups calls its files.
struct Names {
    limit: &'static str,
    used: &'static str,
    /// Pages that the kernel gives up before it refuses anybody.
    reclaimable: [&'static str; 3],
}

const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file ", "total_active_file ", "total_slab_reclaimable "],
};

const VERSION_2: Names = Names {
    limit: "memory.max",
    used: "memory.current",
    reclaimable: ["inactive_file ", "active_file ", "slab_reclaimable "],
};

/// Bytes that all control groups of a process still let it use, where one has a limit. `groups` is
/// its `/proc/self/cgroup`; the groups' files lie under `root`.
fn left_in_groups(groups: &str, root: &Path) -> Option<u64> {
    let mounted = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        match (fields.next()?, fields.next()?) {
            ("", path) => Some((root.to_owned(), path, &VERSION_2)),
            (controllers, path) if controllers.split(',').any(|controller| controller == "memory") => {
                Some((root.join("memory"), path, &VERSION_1))
            }
            _ => None,
        }
    });
    // Every group above sets a limit, too. In a container the path may be one of the host, of which
    // it sees only the last part, as the root.
    let left = mounted.flat_map(|(root, path, names)| {
        let groups = Path::new(path.trim_start_matches('/')).ancestors();
        groups.filter_map(|group| left_in_group(&root.join(group), names)).collect::<Vec<u64>>()
    });
    left.min()
}

/// Bytes that a control group may still use, if it has a limit.
fn left_in_group(group: &Path, names: &Names) -> Option<u64> {
    let read = |file: &str| fs::read_to_string(group.join(file)).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let limit = number(names.limit)?;
    let statistics = read("memory.stat")?;
    let reclaimable = names.reclaimable.iter();
    let reclaimable: u64 = reclaimable
        .filter_map(|name| statistics.lines().find_map(|line| line.strip_prefix(name))?.parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(number(names.used)?.saturating_sub(reclaimable)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_both_versions_and_of_every_group_above_count() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let left = |groups: &str| left_in_groups(groups, folder.path());
        assert_eq!(left("0::/a/b\n4:memory:/x/y\n"), None);
        // Of the second version: a limit of 1000, of which 300 are used, 100 of them by what can
        // go.
        write("a/memory.max", "1000\n");
        write("a/memory.current", "300\n");
        write("a/memory.stat", "anon 200\ninactive_file 60\nactive_file 30\nslab_reclaimable 10\n");
        write("a/b/memory.max", "max\n");
        assert_eq!(left("0::/a/b\n"), Some(800));
        // Of the first: the group itself is out of sight, as in a container.
        write("memory/memory.limit_in_bytes", "700\n");
        write("memory/memory.usage_in_bytes", "650\n");
        write("memory/memory.stat", "inactive_file 9\ntotal_inactive_file 40\ntotal_active_file 5\n");
        assert_eq!(left("12:cpu,cpuacct:/x\n4:hugetlb,memory:/docker/1f\n0::/\n"), Some(95));
        assert_eq!(left("4:memory:/docker/1f\n0::/a/b\n"), Some(95));
        assert_eq!(left("nonsense\n::\n"), None);
    }
}
