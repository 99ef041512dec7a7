package wasm

// assemble puts the lowered module together once all bodies are lowered.
func (lw *lowering) assemble() []byte {
	if lw.InterruptChecks {
		lw.emitCheckpoint()
		lw.emitLease()
		for _, h := range lw.bulk.order {
			lw.emitHelper(h)
		}
	}
	helpers := len(lw.bulk.order)
	size := len(lw.bytes) - lw.CustomBytes - lw.CodeBytes + len(lw.out) + 256
	m := make([]byte, 0, size)
	m = append(m, lw.bytes[:8]...)

	var scratch []byte
	// emit writes a vector section: the original items and the appended ones.
	emit := func(id, extra int, items []byte) {
		s := lw.sections[id]
		if s.count+extra == 0 {
			return
		}
		original := lw.bytes[s.items:s.end]
		count := appendU32(scratch[:0], uint32(s.count+extra))
		m = appendU32(append(m, byte(id)), uint32(len(count)+len(original)+len(items)))
		m = append(m, count...)
		m = append(m, original...)
		m = append(m, items...)
		scratch = count
	}
	// replace writes a section from scratch.
	replace := func(id int, content []byte) {
		m = appendU32(append(m, byte(id)), uint32(len(content)))
		m = append(m, content...)
	}

	var items []byte
	for _, t := range lw.extraTypes {
		items = append(items, 0x60)
		items = append(appendU32(items, uint32(len(t.Params))), valueTypeBytes(t.Params)...)
		items = append(appendU32(items, uint32(len(t.Results))), valueTypeBytes(t.Results)...)
	}
	emit(sectionType, len(lw.extraTypes), items)
	emit(sectionImport, 0, nil)

	items = items[:0]
	functions := 0
	if lw.InterruptChecks {
		functions = 2 + helpers
		items = appendU32(items, lw.voidType)
		items = appendU32(items, lw.leaseType)
		for range lw.bulk.order {
			items = appendU32(items, lw.bulkType())
		}
	}
	emit(sectionFunction, functions, items)

	if len(lw.tables) > 0 {
		content := appendU32(nil, uint32(len(lw.tables)))
		for _, t := range lw.tables {
			content = lw.appendTable(content, t)
		}
		replace(sectionTable, content)
	}
	switch {
	case lw.memoryDefinitions > 0:
		emit(sectionMemory, 0, nil)
	case lw.InterruptChecks && !lw.HasMemory:
		// Something to grow by nothing: one memory, at least and at most 0 pages.
		replace(sectionMemory, []byte{1, 1, 0, 0})
	}

	items = items[:0]
	globals := 0
	if lw.InterruptChecks {
		globals = 3
		for range globals { // mutable i32, initially 0
			items = append(items, byte(ValueI32), 1, opI32Const, 0, opEnd)
		}
	}
	emit(sectionGlobal, globals, items)

	items = items[:0]
	exports := 0
	export := func(name string, kind ExternKind, index uint32) {
		items = append(appendU32(items, uint32(len(name))), name...)
		items = appendU32(append(items, byte(kind)), index)
		exports++
	}
	if lw.InterruptChecks {
		export(ExportFuel, ExternGlobal, lw.fuel)
		export(ExportKill, ExternGlobal, lw.kill)
		export(ExportRefills, ExternGlobal, lw.refills)
	}
	if lw.HasStart {
		export(ExportStart, ExternFunction, lw.start)
	}
	emit(sectionExport, exports, items)

	emit(sectionElement, 0, nil)
	if lw.hasDataCount {
		replace(sectionDataCount, appendU32(nil, uint32(lw.dataCount)))
	}
	if n := len(lw.layout.bodies) + functions; n > 0 {
		count := appendU32(nil, uint32(n))
		m = appendU32(append(m, sectionCode), uint32(len(count)+len(lw.out)))
		m = append(m, count...)
		m = append(m, lw.out...)
	}
	if lw.sections[sectionData].present && (lw.Data > 0 || lw.hasDataCount) {
		s := lw.sections[sectionData]
		replace(sectionData, append(appendU32(nil, uint32(s.count)), lw.bytes[s.items:s.end]...))
	}
	return m
}

// noTableCap as LowerOptions.MaxTableEntries leaves tables without a maximum
// as they are.
const noTableCap = 1<<32 - 1

func (lw *lowering) appendTable(b []byte, t tableType) []byte {
	if lw.MaxTableEntries != noTableCap && (!t.hasMax || t.max > lw.MaxTableEntries) {
		t.max, t.hasMax = lw.MaxTableEntries, true
	}
	b = append(b, byte(t.element))
	if !t.hasMax {
		return appendU32(append(b, 0), t.min)
	}
	return appendU32(appendU32(append(b, 1), t.min), t.max)
}
