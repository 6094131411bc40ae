//! Records of several files in one: what was measured on several machines, or in several pieces.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::record::{self, Record, RecordError};

/// Several files of records, together.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Merged {
    /// Every record once, as the line it came from, by the time at which it began.
    pub lines: Vec<String>,
    /// Records that were there already, to the last sample.
    pub duplicates: usize,
    /// Records of one run of a cell that differ between files; all of them are kept.
    pub conflicts: Vec<String>,
    /// Lines that could not be used: file, line number, why.
    pub problems: Vec<String>,
    /// Commits (or versions, where there is no commit) of the programs that measured.
    pub builds: BTreeSet<String>,
    /// Machines that measured.
    pub machines: BTreeSet<String>,
}

/// Reads `files` and joins their records. A file that another contains adds nothing.
///
/// # Errors
/// [`RecordError::Read`] for a file that can't be read at all.
pub fn merge<P: AsRef<Path>>(files: &[P]) -> Result<Merged, RecordError> {
    let mut merged = Merged::default();
    let mut kept: Vec<(Record, String)> = Vec::new();
    // by start, cell and machine: places among those kept, and their files
    let mut of_run = BTreeMap::<_, Vec<(usize, &Path)>>::new();
    for file in files {
        let file = file.as_ref();
        let (lines, problems) = record::read_lines(file)?;
        merged.problems.extend(problems);
        for (record, line) in lines {
            let run = (record.started_at.clone(), record.subject.label(), record.machine.name());
            let known = of_run.entry(run).or_default();
            if known.iter().any(|&(place, _)| kept[place].0 == record) {
                merged.duplicates += 1;
                continue;
            }
            // within a file, several short runs of a cell may begin in the same second
            if let Some((_, other)) =
                known.iter().find(|&&(place, other)| other != file && kept[place].0.identity() == record.identity())
            {
                merged.conflicts.push(format!(
                    "{} of {} on {}: {} and {} differ",
                    record.subject.label(),
                    record.started_at,
                    record.machine.name(),
                    other.display(),
                    file.display()
                ));
            }
            known.push((kept.len(), file));
            merged.builds.insert(record.build.commit.clone().unwrap_or_else(|| record.build.version.clone()));
            merged.machines.insert(record.machine.name());
            kept.push((record, line));
        }
    }
    // UTC in one form sorts as text
    kept.sort_by(|(one, _), (other, _)| one.started_at.cmp(&other.started_at));
    merged.lines = kept.into_iter().map(|(_, line)| line).collect();
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;
    use crate::record::{Outcome, Writer};

    #[test]
    fn records_are_joined_once_and_by_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let write = |name: &str, records: &[&Record]| {
            let mut writer = Writer::open(path(name)).unwrap();
            records.iter().for_each(|record| writer.append(record).unwrap());
        };
        let (first, mut later, mut other) = (record(), record(), record());
        later.started_at = "2026-01-02T00:00:00Z".into();
        other.outcome = Outcome::Failed { error: "another".into() };
        other.build.commit = Some("fedcba987654".into());
        write("a", &[&later, &first]);
        // a replicate in the same second of the same file is none of two opinions
        write("b", &[&first, &later]);
        write("c", &[&other]);
        let merged = merge(&[path("a"), path("b"), path("c")]).unwrap();
        let line = |record: &Record| serde_json::to_string(record).unwrap();
        assert_eq!(merged.lines, [line(&first), line(&other), line(&later)]);
        assert_eq!((merged.duplicates, merged.builds.len(), merged.machines.len()), (2, 2, 1));
        assert_eq!(merged.conflicts.len(), 1);
        for expected in ["bert/forward/b1/s128 of 2026-01-01T00:00:00Z", "/a and ", "/c differ"] {
            assert!(merged.conflicts[0].contains(expected), "{}", merged.conflicts[0]);
        }
        write("d", &[&first, &other]);
        assert_eq!(merge(&[path("d")]).unwrap().conflicts, Vec::<String>::new());
        assert!(merge(&[path("nothing")]).is_err());
    }

    #[test]
    fn what_this_version_does_not_know_is_kept_and_torn_lines_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut value = serde_json::to_value(record()).unwrap();
        value.as_object_mut().unwrap().insert("later".into(), 1.into());
        let line = value.to_string();
        std::fs::write(&path, format!("{line}\n{}", &line[..40])).unwrap();
        let merged = merge(&[&path]).unwrap();
        assert_eq!(merged.lines, [line]);
        assert!(merged.problems[0].contains("line 2: truncated"), "{:?}", merged.problems);
    }
}
